"""`Settings`: what a run was asked to do."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Of a fit, or of draws by a sampler; saved in `config.json`.

    :param lm: a folder or a hub name; None is the LM that ships with the package.
    :param init_from: the run whose fitted guide the fit began with; None: a guide that is untrained, as `finetuned` a copy
        of the prior.
    :param dtype: of the LM's weights: float32, bfloat16 or float16; None: as the LM was saved by ppl_lm, else float32.
    :param rank: of the adapter that `lora` fits.
    :param reward: as the command line names them; what is asked for is their sum with `reward_weights`, None being 1 each.
    :param arguments: the programs' own, by name.
    :param chat: whether prompts that are texts were made chats, each the user's message; `system`: the message before it.
    :param time_limit: seconds.
    :param eval_prompts: those that the guide is measured on, with their columns; None: `prompts`."""

    model: str
    guide: str = "finetuned"
    rank: int = 16
    init_from: str | None = None
    objective: str = "reverse_kl"
    lm: str | None = None
    reward: list[str] = field(default_factory=lambda: ["vader"])
    reward_weights: list[float] | None = None
    beta: float = 0.2
    arguments: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    system: str | None = None
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
    eval_prompts: list[Any] | None = None
    eval_columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def reward_in_words(self) -> str:
        """The reward as one line.

        >>> Settings("tilted", reward=["vader", "length"], reward_weights=[1.0, -0.1]).reward_in_words
        '1 × vader + -0.1 × length'
        """
        if self.reward_weights is None:
            return " + ".join(self.reward)
        return " + ".join(f"{w:g} × {name}" for w, name in zip(self.reward_weights, self.reward, strict=True))

    @property
    def measured(self) -> tuple[list[Any], dict[str, list[Any]]]:
        """The prompts that the guide is measured on, and their columns."""
        return (self.prompts, self.columns) if self.eval_prompts is None else (self.eval_prompts, self.eval_columns)

    def measured_on(self, rows: list[int]) -> "Settings":
        """The same, measured on some of these prompts."""
        prompts, columns = self.measured
        some = {name: [column[i] for i in rows] for name, column in columns.items()}
        return replace(self, eval_prompts=[prompts[i] for i in rows], eval_columns=some)

    @property
    def measured_words(self) -> str:
        """What the figures are of, where that is not all prompts of the fit; else ""."""
        if self.eval_prompts is None:
            return ""
        count, held_out = len(self.eval_prompts), [p for p in self.eval_prompts if p not in self.prompts]
        if len(held_out) == count:
            return f"{count} held-out prompts, none of which it was fitted on"
        if not held_out:
            return f"{count} of the {len(self.prompts)} prompts that it was fitted on"
        return f"{count} prompts, {count - len(held_out)} of which it was fitted on"
