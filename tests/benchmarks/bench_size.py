"""What a step with LoRA costs with a network of 1 and of 8 billion parameters: projected from the paces that the chat model of
`PPL_LM_CHAT_MODEL` reaches on this machine. Prints the table of the page "What it costs". Run on purpose: `make bench`."""

import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ppl_lm
from ppl_lm.lm.decoding.decoder import sample
from ppl_lm.lm.network import memory
from ppl_lm.lm.scoring.teacher_forcing import score

CHAT = Path(os.environ.get("PPL_LM_CHAT_MODEL", Path(__file__).parents[3] / "smollm2"))
PROMPTS, TEXTS, WIDTH, TOKENS, RANK = 4, 16, 40, 32, 16
FLOAT, GIB = 4, 2**30


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped keys and a gated feed-forward layer.

    :param width: of the residual stream; `keys`: of keys, and of values; `inner`: of the feed-forward layer."""

    name: str
    layers: int
    width: int
    keys: int
    inner: int
    words: int
    tied: bool = True

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Of one layer."""
        of_attention = [
            (self.width, self.width),
            (self.width, self.keys),
            (self.width, self.keys),
            (self.width, self.width),
        ]
        return [*of_attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with."""
        return self.layers * sum(a * b for a, b in self.matrices) + self.width * self.words

    @property
    def weights(self) -> int:
        return self.multiplied + (0 if self.tied else self.width * self.words)

    @property
    def adapter(self) -> int:
        return RANK * self.layers * sum(a + b for a, b in self.matrices)

    def cache(self, tokens: int) -> int:
        """Bytes of keys and values."""
        return 2 * self.layers * self.keys * tokens * FLOAT


SHAPES = [
    Shape("135 M (SmolLM2)", 30, 576, 192, 1536, 49152),
    Shape("1.2 B (Llama 3.2)", 16, 2048, 512, 8192, 128256),
    Shape("8 B (Llama 3.1)", 32, 4096, 1024, 14336, 128256, tied=False),
]


def test_the_shapes_have_as_many_weights_as_their_names_say():
    assert [round(shape.weights / 1e6) for shape in SHAPES] == [134, 1236, 8030]


def paces(shape: Shape) -> dict[str, float]:
    """Operations a second in drawing, scoring, and scoring with the adapter's gradient: 2, 2 and 4 a weight and token."""
    if not CHAT.is_dir():
        pytest.skip(f"needs SmolLM2-135M-Instruct in {CHAT} (PPL_LM_CHAT_MODEL)")
    prior = ppl_lm.LanguageModel.from_pretrained(CHAT, max_new_tokens=TOKENS, dtype=torch.float32)
    guide = prior.adapted(rank=RANK)
    prompts = prior.prompts([" ".join(["soup"] * WIDTH)] * PROMPTS)
    rows = torch.arange(TEXTS) % PROMPTS
    u = 0.999 * torch.rand(TEXTS, TOKENS, dtype=torch.float64)
    x, _ = sample(guide, prompts, rows, u)
    count = PROMPTS * prompts.ids.shape[-1] + int(prior.vocabulary.lengths(x).sum())

    def plain():
        with torch.no_grad():
            score(prior, prompts, x, rows)

    timed = {
        "draw": (2, lambda: sample(guide, prompts, rows, u)),
        "score": (2, plain),
        "gradient": (4, lambda: score(guide, prompts, x, rows).sum().backward()),
    }
    return {name: operations * shape.multiplied * count / median(call) for name, (operations, call) in timed.items()}


def median(call, repeats=5):
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def row(shape: Shape, pace: dict[str, float]) -> str:
    count = PROMPTS * WIDTH + TEXTS * TOKENS
    seconds = {name: (4 if name == "gradient" else 2) * shape.multiplied * count / of for name, of in pace.items()}
    base = FLOAT * shape.weights
    passes = min(max(2**27, 2 * base), memory(torch.device("cpu")) // 16)
    held = {
        "base": base,
        "adapter": 4 * FLOAT * shape.adapter,
        "a pass": passes + shape.cache(TEXTS * (WIDTH + TOKENS)),
    }
    cells = [shape.name, *(f"{value:,.0f} s" for value in seconds.values()), f"{sum(seconds.values()):,.0f} s"]
    cells += [f"{value / GIB:.1f} GiB" for value in (*held.values(), sum(held.values()))]
    return "| " + " | ".join(cells) + " |"


def test_sizes():
    pace = paces(SHAPES[0])
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    )
    print(", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in pace.items()))
    print(
        "| network | draw | score | gradient | a step | base | adapter | a pass | all |\n|---|---|---|---|---|---|---|---|---|"
    )
    for shape in SHAPES:
        print(row(shape, pace))
