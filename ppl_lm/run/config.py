"""`Config`: what `config.json` holds: what was asked, with the programs as they were, and what it takes to ask it again."""

import inspect
import platform
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import networkx

from ppl_lm.infer.traces.program_graph import model_graph
from ppl_lm.likelihood.reward import Reward
from ppl_lm.likelihood.weighted_rewards import WeightedRewards
from ppl_lm.run.programs import Programs
from ppl_lm.run.settings import Settings

FORMAT = 2  # of run folders; raised when one that was written before cannot be read any more
PACKAGES = ("torch", "pyro-ppl", "transformers", "arviz", "networkx")


@dataclass(frozen=True)
class Sources:
    """Source code of the programs and of the reward; None where Python has none."""

    model: str | None
    guide: str | None
    reward: str | None


@dataclass(frozen=True)
class Config:
    """:param command: as it was typed.
    :param versions: of ppl_lm, Python and the libraries, by name.
    :param device: on which it ran.
    :param arguments: names of those that the posterior takes.
    :param graph: `model_graph` as networkx writes graphs; None of a program that cannot be run for it."""

    command: str
    settings: Settings
    versions: dict[str, str]
    platform: str
    device: str
    arguments: list[str]
    sources: Sources
    graph: dict[str, Any] | None

    @classmethod
    def of(cls, programs: Programs, command: str) -> "Config":
        """Of programs as they are now."""
        arguments = programs.model.arguments
        reward = next((arguments[k] for k in ("reward", "constraint") if k in arguments), None)
        return cls(
            command=command,
            settings=programs.settings,
            versions={"ppl_lm": version("ppl_lm"), "python": platform.python_version()}
            | {package: version(package) for package in PACKAGES},
            platform=platform.platform(),
            device=str(programs.prior.device),
            arguments=[*arguments, *programs.model.networks],
            sources=Sources(
                _source(programs.model.program),
                _source(programs.guide.program),
                _source_of_reward(reward) if isinstance(reward, Reward) else None,
            ),
            graph=_graph(programs),
        )

    def as_json(self) -> dict[str, Any]:
        return {"written_by": "ppl_lm", "format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Config":
        """The inverse of `as_json`, but that any machine may read it: the device that was asked for is no property of the
        posterior."""
        parts = {key: value for key, value in record.items() if key not in ("written_by", "format")}
        asked = parts.pop("settings")
        if isinstance(asked["reward"], str):  # as it was written when there could be but one
            asked = asked | {"reward": [asked["reward"]]}
        settings = replace(Settings(**asked), device=None)
        return cls(settings=settings, sources=Sources(**parts.pop("sources")), **parts)


def _source_of_reward(reward: Reward) -> str | None:
    """Of several, one after the other."""
    parts = reward.rewards if isinstance(reward, WeightedRewards) else [reward]
    sources = [source for part in parts if (source := _source(part.function)) is not None]
    return "\n\n".join(sources) or None


def _source(function: Callable[..., Any]) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # built-ins, and what was made at run time
        return None


def _graph(programs: Programs) -> dict[str, Any] | None:
    try:
        graph = model_graph(programs.model, programs.prompts[:1])
    except Exception:  # whatever a user's program does when its values carry their provenance: the fit is worth more
        return None
    if "prompts" in graph.graph["plates"]:
        graph.graph["plates"]["prompts"] = len(programs.prompts)
    return networkx.node_link_data(graph, edges="edges")
