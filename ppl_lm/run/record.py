"""`Run`: all that is known of a run, which its pages show."""

from dataclasses import dataclass, field
from typing import Any

from ppl_lm.infer.draws import Draws


@dataclass(frozen=True)
class Run:
    """A run, as its folder holds it.

    :param asked: `config.json`: `settings`, `arguments` (the names of those that the posterior takes), `sources`, `graph`,
        `command`, `versions`.
    :param diagnosis: `diagnosis.json`, of a fit or of draws.
    :param draws: the guide's, or whatever a sampler made.
    :param prior: those of the prior beside them, as `Diagnosis.prior` has them; None of a sampler's.
    :param samples: as `samples` gives them.
    :param fit: `fit.json`, and `metrics`: `metrics.jsonl`.
    :param hashes: of the prior's weights and of the vocabulary.
    :param others: further diagnoses in the folder, of other prompts or samplers, by name."""

    name: str
    path: str
    asked: dict[str, Any]
    diagnosis: dict[str, Any]
    draws: Draws
    prior: Draws | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    fit: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def posterior(self) -> dict[str, Any]:
        """The settings that make the posterior: of the reward and its temperature those that the program takes."""
        settings, taken = self.asked["settings"], set(self.asked["arguments"])
        made = {name: settings[name] for name in ("model", "lm", "prompts", "columns", "max_new_tokens")}
        made["reward"] = settings["reward"] if taken & {"reward", "constraint"} else None
        return made | {"beta": settings["beta"] if "beta" in taken else None}

    @property
    def fit_tokens(self) -> int:
        """LM tokens that fitting took."""
        return sum(row["lm_tokens"] for row in self.metrics)
