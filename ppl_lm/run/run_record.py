"""`Run`: all that is known of a run, which its pages show."""

from dataclasses import dataclass, field
from typing import Any

from ppl_lm.criticism.diagnoses.side_by_side import ShownTexts
from ppl_lm.infer.draws import Draws
from ppl_lm.run.config import Config
from ppl_lm.run.fitting.loop import Fit, StepMetrics
from ppl_lm.run.settings import Settings
from ppl_lm.run.typed_diagnosis import DrawsDiagnosis, GuideDiagnosis


@dataclass(frozen=True)
class FailedFit:
    """A fit that an error ended, and which guide it left: `best` or `start`."""

    kept: str
    outcome: str = "failed"


@dataclass(frozen=True)
class Posterior:
    """The settings that make a posterior, of the prompts that it was measured on: of the reward and its temperature those that
    the program takes, else None.

    :param arguments: its own, as far as they were given."""

    model: str
    lm: str | None
    prompts: list[Any]
    columns: dict[str, list[Any]]
    max_new_tokens: int
    reward: str | None
    beta: float | None
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as its folder holds it.

    :param name: of the folder, and its `path`.
    :param draws: the fitted guide's, or a sampler's.
    :param hashes: of the prior's weights and of the vocabulary.
    :param others: further diagnoses in the folder, of other prompts or samplers, by name."""

    name: str
    path: str
    config: Config
    draws: Draws
    hashes: dict[str, str]
    others: dict[str, GuideDiagnosis | DrawsDiagnosis] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.config.settings

    @property
    def posterior(self) -> Posterior:
        settings, arguments = self.settings, set(self.config.arguments)
        prompts, columns = settings.measured
        return Posterior(
            model=settings.model,
            lm=settings.lm,
            prompts=prompts,
            columns=columns,
            max_new_tokens=settings.max_new_tokens,
            reward=settings.reward_in_words if arguments & {"reward", "constraint"} else None,
            beta=settings.beta if "beta" in arguments else None,
            arguments={name: value for name, value in settings.arguments.items() if name in arguments},
        )


@dataclass(frozen=True, kw_only=True)
class FittedRun(Run):
    """What `ppl-lm fit` wrote.

    :param prior: draws of the prior beside the guide's, as `Diagnosis.prior` has them."""

    diagnosis: GuideDiagnosis
    prior: Draws
    texts: list[ShownTexts]
    fit: Fit | FailedFit
    metrics: list[StepMetrics]

    @property
    def fit_tokens(self) -> int:
        """LM tokens that fitting took."""
        return sum(row["lm_tokens"] for row in self.metrics)


@dataclass(frozen=True, kw_only=True)
class SampledRun(Run):
    """What `ppl-lm sample` wrote."""

    diagnosis: DrawsDiagnosis
