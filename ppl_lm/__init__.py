"""Say which text you want as a Pyro program. Get it by inference. Know how close you got."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_lm.diagnose import Diagnosis, Evidence, drawn, ess, log_evidence, psis_khat, smoothed, to_arviz
    from ppl_lm.infer import (
        Draws,
        SequenceELBO,
        SequenceKernel,
        baselines,
        best_of_n,
        bind,
        exact,
        importance,
        mcmc,
        objectives,
        off_policy,
        quasi_rejection,
        rejection,
        score,
    )  # fmt: skip
    from ppl_lm.likelihood import BestOf, Optimality, Reward, RewardError, RewardTimeout, rewards
    from ppl_lm.lm import LanguageModel, Prompts, TokenSequence, batches
    from ppl_lm.run import fit

_HOME = {  # public name -> module; imported when first asked for, so that `import ppl_lm` is cheap
    **dict.fromkeys(("LanguageModel", "Prompts", "TokenSequence", "batches"), "ppl_lm.lm"),
    **dict.fromkeys(("BestOf", "Optimality", "Reward", "RewardError", "RewardTimeout", "rewards"), "ppl_lm.likelihood"),
    **dict.fromkeys(
        ("Draws", "SequenceELBO", "bind", "exact", "importance", "mcmc", "rejection", "score"), "ppl_lm.infer"
    ),
    **dict.fromkeys(("SequenceKernel", "best_of_n", "quasi_rejection"), "ppl_lm.infer"),
    **dict.fromkeys(("baselines", "objectives", "off_policy"), "ppl_lm.infer"),
    **dict.fromkeys(
        ("Diagnosis", "Evidence", "drawn", "ess", "log_evidence", "psis_khat", "smoothed", "to_arviz"),
        "ppl_lm.diagnose",
    ),
    "fit": "ppl_lm.run",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = version("ppl_lm")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ppl_lm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
