"""`Settings`: what a run was asked to do."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Of a fit, or of draws by a sampler; saved in `config.json`.

    :param lm: a folder or a hub name; None is the LM that ships with the package.
    :param init_from: the run whose fitted guide the fit began with; None: a guide that is untrained, as `finetuned` a copy
        of the prior.
    :param dtype: of the LM's weights: float32, bfloat16 or float16; None: as the LM was saved by ppl_lm, else float32.
    :param rank: of the adapter that `lora` fits.
    :param time_limit: seconds."""

    model: str
    guide: str = "finetuned"
    rank: int = 16
    init_from: str | None = None
    objective: str = "reverse_kl"
    lm: str | None = None
    reward: str = "vader"
    beta: float = 0.2
    prompts: list[Any] = field(default_factory=lambda: [""])
    columns: dict[str, list[Any]] = field(default_factory=dict)
    max_new_tokens: int = 40
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    particles: int = 128
    batch_size: int = 16
    learning_rate: float | None = None
    max_steps: int | None = None
    time_limit: float | None = None
