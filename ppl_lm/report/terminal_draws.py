"""What `ppl-lm sample` prints: draws with their figures, and what they are worth."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from ppl_lm.criticism.diagnoses.side_by_side import some
from ppl_lm.infer.draws import EQUAL, Draws
from ppl_lm.lm.prompt_names import readable
from ppl_lm.plot.untrusted import one_line
from ppl_lm.report.terminal import clean
from ppl_lm.run.files import finite
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis


def draw_lines(draws: Draws, count: int) -> list[Text]:
    """`count` draws of each prompt, a line each, below the names of their figures."""
    rows = draw_rows(draws, count)
    names = [name for name in rows[0] if name not in ("prompt", "completion")]
    lines = [Text("  ".join([*names, "prompt │ completion"]), style="bold")]
    for row in rows:
        numbers = "  ".join(f"{row[name]:+{len(name)}.2f}" for name in names)
        lines.append(Text(f"{numbers} ") + clean(f"{readable(row['prompt'])} │ {row['completion']}"))
    return lines


def draw_rows(draws: Draws, count: int) -> list[dict[str, Any]]:
    """`count` draws of each prompt: `prompt`, `completion`, what the model recorded, and the log weight (nats) of weighted
    draws."""
    few = some(draws, count)
    columns = {name: value[0] for name, value in few.records.items()}  # (S, B)
    if few.kind not in EQUAL:
        columns["log_weight"] = few.log_weight[0].expand(-1, len(few.prompts))
    return [
        {"prompt": few.prompts.texts[b], "completion": text, **{k: float(v[s, b]) for k, v in columns.items()}}
        for b, texts in enumerate(few.text())
        for s, text in enumerate(texts)
    ]


def json_rows(draws: Draws, count: int) -> list[dict[str, Any]]:
    """The same for JSON, which has no -inf, to four decimals."""
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in finite(row).items()}
        for row in draw_rows(draws, count)
    ]


def worth(diagnosis: DrawsDiagnosis, records: Sequence[str] = ("reward",)) -> str:
    """The figures in a line, posterior means of these records first, the reward before its parts."""
    average, mean = diagnosis.average, "mean " if len(diagnosis.prompts) > 1 else ""
    parts = []
    for name in sorted(records, key=lambda name: name != "reward"):
        known = average.means.get(name)
        if known is not None and known.value is not None:
            parts.append(f"{mean}posterior E({one_line(name)}) {_pm(known.value, known.se)}")
    if average.log_z is not None:
        parts.append(f"{mean}log Z {_pm(average.log_z, average.log_z_se)} nats")
    if average.ess:
        parts.append(f"{mean}ESS {average.ess:.0f} of {average.num_samples}")
    cost = f"{average.lm_tokens:,} LM tokens"
    if average.lm_tokens_per_effective_draw:
        cost += f", {average.lm_tokens_per_effective_draw:,.0f} for each effective draw"
    return "; ".join([*parts, cost])


def _pm(value: float, se: float | None) -> str:
    return f"{value:.3f}{'' if se is None else f' ± {se:.3f}'}"
