"""What `ppl-lm` prints of a guide: figures as a table, texts side by side, the verdict. Text from models and rewards is
untrusted: it is shown without markup and without control characters."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ppl_lm.criticism.diagnoses.diagnosis import exact_among
from ppl_lm.criticism.diagnoses.figures import GuideFigures, PromptFigures
from ppl_lm.criticism.diagnoses.verdicts import Verdict, doubt
from ppl_lm.criticism.weights import khat_threshold
from ppl_lm.infer.draws import Draws
from ppl_lm.lm.prompt_names import last_message, readable
from ppl_lm.plot.untrusted import one_line
from ppl_lm.run.measuring import Measurement

COLOURS = {"good": "green", "poor": "yellow", "unknown": "yellow", "worse_than_prior": "red"}
COLOURS |= {"collapsed": "red", "misses_mass": "red"}
COLOURS |= {"exact": "green", "unreliable": "yellow", "not_converged": "red", "impossible": "red"}  # of draws

PROMPTS = 8  # of which a line is printed
TEXTS, WIDTH = 5, 60  # that are printed of each law, and characters of a column
CHAT = 120  # characters of a message that are printed


def clean(text: str, width: int = 0) -> Text:
    """`one_line`, for rich."""
    return Text(one_line(text, width))


def measured(measurement: Measurement) -> list[Table | Text]:
    """A measurement: texts, a line for each of several prompts, the figures, and the verdict."""
    diagnosis, prompts = measurement.diagnosis, measurement.guide.prompts.texts
    several = len(diagnosis.prompts) > 1
    parts: list[Table | Text] = [texts(measurement.prior, measurement.guide, texts_title(prompts))]
    if several:
        parts += [_prompt(one) for one in diagnosis.prompts[:PROMPTS]]
    parts.append(figures(diagnosis.average, "average over prompts" if several else "how close"))
    if unsure := doubt(diagnosis.as_json()):
        parts.append(Text(unsure))
    return [*parts, verdict(diagnosis.verdict)]


def figures(average: GuideFigures, title: str) -> Table:
    """One prompt's figures, or the average."""
    table, f = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)), average
    bounds = (
        f"ELBO {_pm(f.elbo, f.elbo_se)}  ≤  log Z {_pm(f.log_z, f.log_z_se)}  ≤  EUBO {_pm(f.upper, f.upper_se)} nats"
    )
    table.add_row("evidence bracket", bounds)
    prior = _pm(f.kl_prior_p, f.kl_prior_p_se)
    table.add_row("KL(guide ‖ posterior)", f"{_pm(f.kl_q_p, f.kl_q_p_se)} nats; the prior's: {prior}")
    prior = _pm(f.kl_p_prior, f.kl_p_prior_se)
    table.add_row("KL(posterior ‖ guide)", f"{_pm(f.kl_p_q, f.kl_p_q_se)} nats; the prior's: {prior}")
    if f.possible < 1:
        table.add_row("possible draws", f"{f.possible:.1%} of the guide's meet the constraint")
    table.add_row("KL(guide ‖ prior)", f"{_pm(f.kl_q_prior, f.kl_q_prior_se)} nats")
    if f.reward is not None:
        prior, posterior = _pm(f.reward_prior, f.reward_prior_se), _pm(f.reward_posterior, f.reward_posterior_se)
        table.add_row("E(reward)", f"prior {prior}, guide {_pm(f.reward, f.reward_se)}, posterior {posterior}")
    for name, means in f.recorded.items():
        prior, guide = _pm(means.prior, means.prior_se), _pm(means.guide, means.guide_se)
        posterior = _pm(means.posterior, means.posterior_se)
        table.add_row(clean(f"E({name})"), f"prior {prior}, guide {guide}, posterior {posterior}")
    if f.bellman_rms is not None:
        table.add_row("the twist's error", f"Bellman residual {f.bellman_rms:.2g} nats a token (root mean square)")
    table.add_row("posterior mass missed", f"{f.missing:.1%} ± {f.missing_se:.1%}")
    posterior = _pm(f.entropy_posterior, f.entropy_posterior_se)
    table.add_row("entropy", f"guide {_pm(f.entropy, f.entropy_se)}, posterior {posterior} nats")
    khat = "not applicable (tied or few weights)"
    if f.khat is not None:
        khat = f"{round(f.khat, 2) + 0.0:.2f} ± {f.khat_se:.2f}, fine below {khat_threshold(f.num_samples):.2f}"
    worth = f"ESS {f.ess:.0f} ± {f.ess_se:.0f} of {f.num_samples}; largest weight {f.max_weight:.1%} of all"
    table.add_row("importance weights", worth)
    table.add_row("tail of the weights", f"k-hat {khat}")
    table.add_row("cost of measuring", f"{f.lm_tokens:,} LM tokens, {f.reward_calls:,} reward calls")
    return table


def texts(prior: Draws, guide: Draws, title: str) -> Table:
    """Draws of the prior, the guide and the posterior after the first prompt side by side, each with its reward."""
    table = Table(title=Text(title), title_justify="left", show_lines=True, expand=False)
    columns = {"prior": prior.of_prompt(0), "guide": guide.of_prompt(0)}
    exact = exact_among(columns["prior"])
    if exact is not None:
        columns["posterior (exact: the prior's that rejection keeps)"] = exact
    cells = []
    for name, draws in columns.items():
        table.add_column(name, max_width=WIDTH, overflow="fold")
        completions = draws.text()[0][:TEXTS]
        rewards = draws.records.get("reward")
        values = [None] * len(completions) if rewards is None else rewards.flatten().tolist()
        cells.append([_cell(text, reward) for text, reward in zip(completions, values, strict=False)])
    for row in zip(*cells, strict=False):
        table.add_row(*row)
    return table


def texts_title(prompts: Sequence[Any]) -> str:
    """Whose texts are shown: those of the first prompt, which may be a chat."""
    several = len(prompts) > 1
    if isinstance(prompts[0], str):
        title = f"samples{f' after {clean(prompts[0], 40).plain!r}' if prompts[0] else ''}"
        return f"{title}, the first of {len(prompts)} prompts" if several else title
    chat = [f"  {clean(readable([message]), CHAT).plain}" for message in prompts[0]]
    return "\n".join(["samples after the chat", *chat, *[f"the first of {len(prompts)} prompts"] * several])


def verdict(judged: Verdict) -> Text:
    sentence = f"{judged.sentence} {judged.remedy}".rstrip()
    return Text.assemble((judged.code, f"bold {COLOURS[judged.code]}"), ": ", sentence)


def _prompt(one: PromptFigures) -> Text:
    """A line of one prompt; under a hard constraint of the KL that is finite there."""
    name = clean(last_message(one.prompt), 40).plain
    what, kl, se, prior = "KL(guide ‖ posterior)", one.kl_q_p, one.kl_q_p_se, one.kl_prior_p
    if math.isinf(prior):
        what, kl, se, prior = "KL(posterior ‖ guide)", one.kl_p_q, one.kl_p_q_se, one.kl_p_prior
    return Text(
        f"{name!r:42} {what} {kl:.3f} ± {se:.3f} of the prior's {prior:.3f}; bracket {one.elbo:.2f} to {one.upper:.2f}; "
        f"{one.verdict}"
    )


def _pm(value: float | None, se: float | None) -> str:
    if value is None or se is None or not math.isfinite(value):
        return str(value)
    return f"{round(value, 3) + 0.0:.3f} ± {se:.3f}"  # + 0.0: no minus before a zero


def _cell(text: str, reward: float | None) -> Text:
    return clean(text) if reward is None else Text.assemble((f"{reward:+.2f} ", "bold"), clean(text))
