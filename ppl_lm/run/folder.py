"""A run folder: what was asked (`config.json`), how it went (`metrics.jsonl`), and what came out of it."""

import hashlib
import inspect
import itertools
import json
import os
import platform
import shutil
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx
import pyro
import torch
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.traces.program_graph import model_graph
from ppl_lm.likelihood.reward import Reward
from ppl_lm.lm.language_model import LanguageModel, quiet
from ppl_lm.lm.prompts import Prompts
from ppl_lm.run.programs import model_and_guide, resolve

MARK = "config.json"


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; saved as `config.json`. `lm` None is the LM that ships with the package."""

    model: str
    guide: str = "finetuned"
    objective: str = "reverse_kl"
    lm: str | None = None
    reward: str = "vader"
    beta: float = 0.2
    prompts: list[Any] = field(default_factory=lambda: [""])
    columns: dict[str, list[Any]] = field(default_factory=dict)
    max_new_tokens: int = 40
    device: str | None = None
    seed: int = 0
    particles: int = 128
    batch_size: int = 16
    learning_rate: float | None = None
    max_steps: int | None = None
    time_limit: float | None = None


@dataclass(frozen=True)
class Programs:
    """A run's programs, bound."""

    model: Bound
    guide: Bound
    prior: LanguageModel
    prompts: Prompts


def build(settings: Settings, fitted: Path | None = None) -> Programs:
    """Loads the LM and binds the programs; with `fitted`, the guide's network is read from that folder.

    :raises ValueError: on anything that does not exist or does not fit together, by name."""
    from ppl_lm.run.programs import resolve_reward

    if not 0 < settings.beta < float("inf"):
        raise ValueError(f"beta={settings.beta}; the reward's temperature must be above 0")
    model, guide = resolve(settings.model, "models"), resolve(settings.guide, "guides")
    reward = resolve_reward(settings.reward)
    if settings.device is not None:
        try:
            torch.empty(0, device=settings.device)
        except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: by device and build
            raise ValueError(
                f"device={settings.device!r} cannot be used here; give cpu, or cuda where there is one: {error}"
            ) from None
    load: Any = {} if settings.lm is None else {"name_or_folder": settings.lm}
    prior = LanguageModel.from_pretrained(**load, max_new_tokens=settings.max_new_tokens, device=settings.device)
    network = None
    if fitted is not None:
        import ppl_lm.lm.table  # noqa: F401  so that a fitted table loads

        network = LanguageModel.from_pretrained(fitted, settings.max_new_tokens, device=settings.device)
        network.vocabulary.require_same(prior.vocabulary, f"{fitted.name} and the prior")
    target, bound = model_and_guide(model, guide, prior, network, reward, settings.beta)
    prompts = prior.prompts({"prompt": settings.prompts, **settings.columns})
    prior(prompts)  # refuses prompts that do not fit the context
    return Programs(target, bound, prior, prompts)


def by_time(name: str) -> Path:
    """A folder below `runs` that does not exist, named by the time."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (Path("runs") / f"{stem}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def require_free(folder: Path, overwrite: bool = False, keep_fit: bool = False) -> None:
    """:raises ValueError: if the folder holds anything, save a run where that may be overwritten.

    :param keep_fit: a run that holds a fitted guide may not."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_run(folder):
        raise ValueError(f"output-dir={str(folder)!r} exists and is not a run of ppl-lm; give another, or remove it")
    if not overwrite:
        raise ValueError(f"output-dir={str(folder)!r} holds an earlier run; give another, or --overwrite it")
    if keep_fit and (folder / "guide").exists():
        raise ValueError(f"output-dir={str(folder)!r} holds a fitted guide, which draws do not replace; give another")


def claim(folder: Path, overwrite: bool) -> None:
    """Makes a run folder, or empties an earlier run's if that may be overwritten."""
    require_free(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("guide", "draws*.nc", "diagnosis*.json", "samples*.json", "metrics.jsonl", "fit.json", "report.html", MARK)
    for path in [path for name in names for path in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_settings(folder: Path) -> Settings:
    """:raises ValueError: if the folder is not a run."""
    if not _is_run(folder):
        raise ValueError(f"{str(folder)!r} is not a run folder: it has no {MARK} written by ppl-lm fit")
    made = json.loads((folder / MARK).read_text())
    return Settings(**{**made["settings"], "device": None})  # no property of the posterior: any machine may read it


def fitted_guide(folder: Path) -> Path:
    """:raises ValueError: if the run holds no fitted guide."""
    if not (folder / "guide").is_dir():
        raise ValueError(f"{str(folder)!r} holds no fitted guide (`ppl-lm fit` writes one); give a MODEL with --guide")
    return folder / "guide"


def write_settings(folder: Path, settings: Settings, programs: Programs, command: str) -> None:
    """What was asked, with the programs as they are now, and what it takes to ask it again."""
    packages = ("torch", "pyro-ppl", "transformers", "arviz", "networkx")
    versions = {"ppl_lm": version("ppl_lm"), "python": platform.python_version()} | {p: version(p) for p in packages}
    reward = next(
        (programs.model.arguments[k] for k in ("reward", "constraint") if k in programs.model.arguments), None
    )
    functions: dict[str, Any] = {"model": programs.model.program, "guide": programs.guide.program}
    functions["reward"] = reward.function if isinstance(reward, Reward) else None
    asked: dict[str, Any] = {"written_by": "ppl_lm", "command": command, "settings": asdict(settings)}
    asked |= {"versions": versions, "platform": platform.platform(), "device": str(programs.prior.device)}
    asked["arguments"] = [*programs.model.arguments, *programs.model.networks]
    asked["sources"] = {name: _source(function) for name, function in functions.items()}
    asked["graph"] = _graph(programs)
    write_json(folder / MARK, asked)


def _source(function: Any) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # built-ins, and what was made at run time
        return None


def _graph(programs: Programs) -> dict[str, Any] | None:
    """`model_graph` as networkx writes graphs; None of a program that cannot be run for it."""
    try:
        graph = model_graph(programs.model, programs.prompts[:1])
    except Exception:  # whatever a user's program does when its values carry their provenance: the fit is worth more
        return None
    if "prompts" in graph.graph["plates"]:
        graph.graph["plates"]["prompts"] = len(programs.prompts)
    return networkx.node_link_data(graph, edges="edges")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; NaN and infinities, which JSON has not, become null."""

    def clean(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: clean(w) for k, w in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(w) for w in v]
        return None if isinstance(v, float) and not (abs(v) < float("inf")) else v

    write_text(path, json.dumps(clean(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_guide(folder: Path, guide: Bound, probes: Prompts) -> None:
    """Writes the guide's language model to `folder/guide` as a Hugging Face folder, and checks that what would be read
    back gives the same log-probabilities.

    :raises ValueError: if the guide has no language model, or its copy on disk differs."""
    lm = _fitted(guide)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".guide-"))
    try:
        with quiet():
            lm.model.save_pretrained(temporary)  # type: ignore[operator]
        lm.vocabulary.tokenizer.save_pretrained(temporary)
        again = LanguageModel.from_pretrained(
            temporary, lm.max_new_tokens, device=lm.device, dtype=next(lm.parameters()).dtype
        )
        with torch.random.fork_rng(), torch.no_grad():
            few = probes.take(torch.arange(min(4, len(probes))))
            x = lm(few).sample()
            worst = float((lm(few).log_prob(x) - again(few).log_prob(x)).abs().max())
        if not worst < 1e-3:
            raise ValueError(f"the saved guide scores texts {worst:.2g} nats differently from the one in memory")
        del again  # its file is mapped into memory, which Windows would not rename
        temporary.chmod(0o755)
        os.replace(temporary, folder / "guide")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_savable(model: Bound, guide: Bound) -> None:
    """:raises ValueError: if something else is trained than one language model of the guide: it could not be saved."""
    lm = _fitted(guide)
    kept = {id(p) for p in lm.parameters()}
    others = [
        n for bound in (model, guide) for n, p in bound.named_parameters() if p.requires_grad and id(p) not in kept
    ]
    others += [n for n in pyro.get_param_store().keys() if _MODULE_NAMESPACE_DIVIDER not in n]  # noqa: SIM118
    if others:
        raise ValueError(
            f"a run folder holds one fitted language model, but {others[0]!r} is trained too; fit such programs in Python "
            "with ppl_lm.fit, and save them yourself"
        )


def _fitted(guide: Bound) -> LanguageModel:
    found = [m for m in guide.networks.values() if isinstance(m, LanguageModel)]
    found = [m for m in found if any(p.requires_grad for p in m.parameters())]
    if not found:
        raise ValueError("the guide has nothing to train; choose another, or draw from it as it is")
    return found[0]


def save_draws(path: Path, data: Any) -> None:
    """NetCDF, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    data.to_netcdf(str(temporary))
    os.replace(temporary, path)


def constant_data(settings: Settings, prior: LanguageModel) -> dict[str, Any]:
    """What the posterior was made of, for `to_arviz`."""
    made = {
        "model": settings.model,
        "reward": settings.reward,
        "beta": settings.beta,
        "prior_sha256": fingerprint(prior),
    }
    return made | {"vocabulary_sha256": prior.vocabulary.fingerprint}


def fingerprint(lm: torch.nn.Module) -> str:
    """A hash of each weight's name, shape and first 1,024 numbers."""
    digest = hashlib.sha256()
    for name, weight in lm.state_dict().items():
        digest.update(repr((name, tuple(weight.shape))).encode())
        digest.update(weight.flatten()[:1024].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_run(folder: Path) -> bool:
    try:
        return json.loads((folder / MARK).read_text()).get("written_by") == "ppl_lm"
    except (OSError, ValueError, AttributeError):
        return False
