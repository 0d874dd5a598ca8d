"""What a fit will cost, by a few texts that are timed before it begins, and how its time is shared out."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ppl_lm.criticism.diagnoses.diagnosis import least_draws
from ppl_lm.infer.binding import Bound
from ppl_lm.infer.elbo import SequenceELBO
from ppl_lm.likelihood.reward import preserved_rng
from ppl_lm.lm.network import Network
from ppl_lm.lm.prompts import Prompts
from ppl_lm.run.fitting.best_guide import WINDOW
from ppl_lm.run.fitting.loop import AFTER, BEFORE

PILOT = 4.0  # seconds, after which no more texts are timed
SHORT, FIRST = (2, 6), 16  # tokens of the texts that a slow network is timed with, and how many these are
MEASURING, MOST_MEASURING = (
    0.2,
    0.5,
)  # share of the limit that measuring the guide gets; and where the least of it takes more
WISHED = 100  # steps, for which a step gets fewer texts
FASTER = 0.6  # what half of the texts must make of a step's time, for noise falls with the texts that a second gives
FEWEST = 16  # prompts that a verdict is of, where all are too many
FASTER_OF_FEW = 0.8  # the same where fewer than `WINDOW` steps would fit
LEAST_TEXTS = 16  # a step
EACH = 4  # prompts, and texts of each, in steps of few texts
SHOWN = 24  # texts that are shown, at the least: each is scored twice


@dataclass(frozen=True)
class Speed:
    """Seconds that a number of texts takes, of which `rows` go through the network at a time.

    :param drawing: a pass of drawing by the guide and scoring by the prior and the reward, and each text of it.
    :param training: likewise what a step takes beyond that.
    :param is_local: whether each prompt has a posterior of its own; else all of them are needed at once."""

    drawing: tuple[float, float]
    training: tuple[float, float]
    rows: int
    is_local: bool = True

    def draw(self, texts: float) -> float:
        return self.drawing[0] * math.ceil(texts / self.rows) + self.drawing[1] * texts

    def step(self, texts: float) -> float:
        return self.draw(texts) + self.training[0] + self.training[1] * texts


def pilot(
    model: Bound, guide: Bound, prompts: Prompts, loss: Callable[[int], SequenceELBO], particles: int, batch_size: int
) -> Speed:
    """Times steps that move nothing, for a few seconds: of short texts where whole ones take longer than that. Random states
    stay as they are.

    :param loss: of a number of particles, new at each call."""
    pilots = _Pilot(model, guide, prompts, loss, particles, particles * min(batch_size, len(prompts)))
    with preserved_rng():
        drawing, training = pilots.of_short_texts() or pilots.of_whole_texts()
    for weight in (*model.parameters(), *guide.parameters()):
        weight.grad = None
    lm = guide.lm or model.lm
    rows_per_pass = drawing[-1][0] if lm is None else lm.rows_per_pass(prompts.ids.shape[-1] + lm.max_new_tokens, 1)
    return Speed(_line(drawing, 0.25), _line(training, 1.0), max(1, rows_per_pass), pilots.is_local)


Timed = list[tuple[int, float]]  # numbers of texts, and the seconds that each took


@dataclass
class _Pilot:
    """What `pilot` was given, with the `texts` of a whole step; `is_local` as in `Speed`, known after a step."""

    model: Bound
    guide: Bound
    prompts: Prompts
    loss: Callable[[int], SequenceELBO]
    particles: int
    texts: int
    is_local: bool = True

    def draw(self, texts: int) -> tuple[int, float, Callable[[], float]]:
        """The first phase of a step of so many texts: their number, its seconds, and what times the second phase."""
        k = max(2, min(self.particles, texts // EACH if len(self.prompts) > 1 else texts))
        rows = torch.linspace(0, len(self.prompts) - 1, max(1, texts // k)).long()
        began, elbo = time.monotonic(), self.loss(k)
        drawn = elbo.particles(self.model, self.guide, self.prompts.take(rows))
        self.is_local = drawn.is_local
        seconds = time.monotonic() - began

        def train() -> float:
            began = time.monotonic()
            elbo.accumulate(drawn)
            return time.monotonic() - began

        return k * len(rows), seconds, train

    def of_short_texts(self) -> tuple[Timed, Timed] | None:
        """A step's drawing and training, from texts of a few tokens: the cost of a token more is the same for any. None where
        the texts are short anyhow or whole ones are fast, and of programs that such texts do not suit."""
        networks = [m for p in (self.model, self.guide) for m in p.modules() if isinstance(m, Network)]
        lengths = {network.max_new_tokens for network in networks}
        if len(lengths) != 1 or (length := lengths.pop()) < 4 * SHORT[-1]:
            return None
        seconds: list[tuple[float, float]] = []
        found = [
            dict(network.crossed) for network in networks
        ]  # at which lengths a law changes: short texts tell little
        try:
            for tokens in (SHORT[0], *SHORT):  # the first pays for what is done once
                for network in networks:
                    network.max_new_tokens = tokens
                count, drawing, train = self.draw(
                    min(self.texts, FIRST if seconds and sum(seconds[0]) < 2 * PILOT else 2)
                )
                seconds.append((drawing, train()))
        except Exception:  # what is asked of a text may need all of its tokens
            return None
        finally:
            for network, crossed in zip(networks, found, strict=True):
                network.max_new_tokens, network.crossed = length, crossed
        # As if no text ended early: what is forecast is the most that it takes.
        times = (length - SHORT[0]) / (SHORT[1] - SHORT[0])
        drawing, training = (a + times * max(0.0, b - a) for a, b in zip(seconds[1], seconds[2], strict=True))
        return None if drawing + training < PILOT / 2 else ([(count, drawing)], [(count, training)])

    def of_whole_texts(self) -> tuple[Timed, Timed]:
        """Two texts, then eight and so on, up to a whole step: of a large network only the first with gradient, whose cost a
        text is the same for any number of them."""
        began, texts = time.monotonic(), 0
        drawing: Timed = []
        training: Timed = []
        while texts < self.texts and (
            time.monotonic() - began < PILOT or (len(drawing) == 1 and drawing[0][1] < PILOT)
        ):
            texts = min(self.texts, max(2, 4 * texts))
            count, seconds, train = self.draw(texts)
            drawing.append((count, seconds))
            if not training or training[-1][1] / training[-1][0] * count < PILOT - seconds:
                training.append((count, train()))
        return drawing, training


def _line(timed: list[tuple[int, float]], alike: float) -> tuple[float, float]:
    """What any number of texts takes, and each of them, by the last two numbers that were timed: the first pays for what is
    done once.

    :param alike: share that grows with the number of texts, where but one was timed."""
    count, seconds = timed[-1]
    if len(timed) == 1:
        return (1 - alike) * seconds, alike * seconds / count
    fewer, less = timed[-2]
    each = min(max((seconds - less) / max(1, count - fewer), 0.1 * seconds / count), seconds / count)
    return seconds - each * count, each


@dataclass(frozen=True)
class Plan:
    """How a limit in seconds is shared out.

    :param particles: and `batch_size`, of a step; `steps`: how many of them fit.
    :param measured: prompts on which the guide is measured, and `num_samples` the draws of each, `least` to at most so many;
        None where too few fit for a verdict.
    :param fitting: seconds; likewise `step` and `measuring`; `wanted`: the limit that would allow `WISHED` steps."""

    particles: int
    batch_size: int
    steps: float
    step: float
    measured: int
    num_samples: int | None
    least: int
    fitting: float
    measuring: float
    wanted: float


def plan(
    speed: Speed,
    limit: float,
    particles: int,
    batch_size: int,
    held: int,
    num_samples: int,
    may_shrink: tuple[bool, bool] = (False, False),
) -> Plan:
    """The fit gets what measuring leaves, which is a fifth of the limit, less where that is not needed, and up to a half where
    the least number of draws for a verdict needs it. A step of which `WISHED` would not fit gets fewer texts.

    :param held: prompts that the guide is measured on; where draws of all are too many it is on some.
    :param num_samples: draws of each that are wanted.
    :param may_shrink: whether particles, and the batch size, are for this to choose."""
    count, wished, shown = held, num_samples, 2 * speed.draw(SHOWN)

    def cost(draws: int) -> float:
        return 2 * speed.draw(draws * count) + shown

    while speed.is_local and count > FEWEST and cost(least_draws(count)) > MOST_MEASURING * limit:
        count = max(FEWEST, count * 3 // 4)
    least = min(num_samples, least_draws(count if speed.is_local else 1))
    measuring = min(cost(num_samples), max(MEASURING * limit, cost(least)))
    if cost(least) > MOST_MEASURING * limit:
        wished, measuring = None, shown
    fitting = limit - measuring
    few = speed.draw(LEAST_TEXTS)  # of the least measurements in a fit
    loop = max(0.0, fitting - max(BEFORE * fitting, few) - max(AFTER * fitting, 2 * few))
    fewest = (
        batch_size  # prompts: each passes once for its texts, and many of one prompt are each other's better baseline
    )
    if may_shrink[1] and speed.is_local:
        fewest = min(batch_size, EACH if may_shrink[0] else max(1, LEAST_TEXTS // particles))
    shrunk = [(particles, max(fewest, batch_size // 2**i)) for i in range(8)]
    if may_shrink[0]:
        least_particles = min(particles, EACH if batch_size > 1 else LEAST_TEXTS)
        shrunk += [(max(least_particles, particles // 2**i), fewest) for i in range(1, 8)]
    for fewer in shrunk:  # fewer texts a step, as long as they make it faster
        if WISHED * speed.step(particles * batch_size) <= loop:
            break
        texts, less = particles * batch_size, fewer[0] * fewer[1]
        half = FASTER if WINDOW * speed.step(texts) <= loop else FASTER_OF_FEW
        if less < texts and speed.step(less) < speed.step(texts) * half ** math.log2(texts / less):
            particles, batch_size = fewer
    step = speed.step(particles * batch_size)
    wanted = max(limit, WISHED * step / (1 - BEFORE - AFTER) / (1 - MEASURING))
    return Plan(particles, batch_size, loop / step, step, count, wished, least, fitting, measuring, wanted)
