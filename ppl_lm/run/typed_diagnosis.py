"""What `diagnosis.json` holds: the figures of a guide, or of the draws of a sampler, the verdict, and how they came about."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppl_lm.criticism.diagnoses.figures import DrawsFigures, GuideFigures, PromptDrawsFigures, PromptFigures
from ppl_lm.criticism.diagnoses.verdicts import Verdict


@dataclass(frozen=True)
class GuideDiagnosis:
    """:param diversity: `ppl_lm.diversity` of `prior`, `guide` and `posterior`; None of a law without draws.
    :param command: by which it was asked for, "" where that was the fit's.
    :param outcome: of the fit, and which guide it `kept`; None where the guide was measured on its own.
    :param kept_verdict: on the guide that was kept, where the verdict is on a fit that went wrong."""

    average: GuideFigures
    verdict: Verdict
    prompts: list[PromptFigures]
    diversity: dict[str, dict[str, Any] | None]
    seed: int
    command: str = ""
    outcome: str | None = None
    kept: str | None = None
    kept_verdict: str | None = None

    @property
    def hard(self) -> bool:
        """Whether the posterior rules texts out: KL(guide ‖ posterior) is infinite then, and KL(posterior ‖ guide) decides."""
        return self.average.kl_prior_p == math.inf

    def as_json(self) -> dict[str, Any]:
        optional = {"outcome": self.outcome, "kept": self.kept, "kept_verdict": self.kept_verdict}
        return {
            **self.average.as_json(),
            **_verdict_json(self.verdict),
            "remedy": self.verdict.remedy,
            "prompts": [{"prompt": one.prompt, **one.as_json()} for one in self.prompts],
            "diversity": self.diversity,
            "seed": self.seed,
            "command": self.command,
            **{key: value for key, value in optional.items() if value is not None},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "GuideDiagnosis":
        return cls(
            average=GuideFigures.from_json(record),
            verdict=Verdict(record["verdict"], record["sentence"], record["remedy"]),
            prompts=[PromptFigures.from_json(one) for one in record["prompts"]],
            diversity=record["diversity"],
            seed=record["seed"],
            command=record["command"],
            outcome=record.get("outcome"),
            kept=record.get("kept"),
            kept_verdict=record.get("kept_verdict"),
        )


@dataclass(frozen=True)
class DrawsDiagnosis:
    """:param how: how the draws came about, in words."""

    average: DrawsFigures
    verdict: Verdict
    prompts: list[PromptDrawsFigures]
    sampler: str
    seed: int
    how: str

    def as_json(self) -> dict[str, Any]:
        asked = {"sampler": self.sampler, "seed": self.seed, "how": self.how}
        prompts = [one.as_json() for one in self.prompts]
        figures = {**self.average.as_json(), **_verdict_json(self.verdict), "prompts": prompts}
        return {**asked, **figures, **asked}  # asked stands first, and no record of a model's passes for it

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DrawsDiagnosis":
        return cls(
            average=DrawsFigures.from_json(record),
            verdict=Verdict(record["verdict"], record["sentence"]),
            prompts=[PromptDrawsFigures.from_json(one) for one in record["prompts"]],
            sampler=record["sampler"],
            seed=record["seed"],
            how=record["how"],
        )


def diagnosis_from_json(record: Mapping[str, Any]) -> GuideDiagnosis | DrawsDiagnosis:
    return (DrawsDiagnosis if "sampler" in record else GuideDiagnosis).from_json(record)


def _verdict_json(verdict: Verdict) -> dict[str, str]:
    return {"verdict": verdict.code, "sentence": verdict.sentence}
