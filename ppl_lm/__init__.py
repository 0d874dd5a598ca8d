"""Say which text you want as a Pyro program. Get it by inference. Know how close you got."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_lm.diagnose import (
        Calibration,
        Compared,
        Diagnosis,
        Evidence,
        PredictiveCheck,
        Sensitivity,
        Verdict,
        automaton_graph,
        compare_models,
        diversity,
        draw_automaton,
        draw_model,
        draw_prefix_tree,
        drawn,
        ess,
        ess_se,
        from_arviz,
        frontier,
        heat_html,
        khat_se,
        log_evidence,
        max_weight,
        model_graph,
        plot_evidence,
        plot_frontier,
        plot_heat,
        plot_sbc,
        plot_training,
        plot_weight_tail,
        power_scale,
        predictive_check,
        prefix_tree,
        psis_khat,
        sbc,
        smoothed,
        to_arviz,
        token_gains,
    )  # fmt: skip
    from ppl_lm.infer import (
        Draws,
        SequenceELBO,
        SequenceKernel,
        baselines,
        best_of_n,
        bind,
        conditional_smc,
        exact,
        exact_twist,
        fit_twist,
        importance,
        mcmc,
        objectives,
        off_policy,
        particle_gibbs,
        prefix_likelihood,
        quasi_rejection,
        rejection,
        replicate,
        resampling,
        score,
        smc,
        tempered,
        twists,
    )  # fmt: skip
    from ppl_lm.likelihood import Automaton, BestOf, Optimality, Reward, RewardError, RewardTimeout, rewards
    from ppl_lm.lm import LanguageModel, Prompts, TokenSequence, batches, product, twist_like
    from ppl_lm.run import fit

_HOME = {  # public name -> module; imported when first asked for, so that `import ppl_lm` is cheap
    **dict.fromkeys(("LanguageModel", "Prompts", "TokenSequence", "batches", "product", "twist_like"), "ppl_lm.lm"),
    **dict.fromkeys(("Automaton", "BestOf", "Optimality", "Reward", "rewards"), "ppl_lm.likelihood"),
    **dict.fromkeys(("RewardError", "RewardTimeout"), "ppl_lm.likelihood"),
    **dict.fromkeys(
        ("Draws", "SequenceELBO", "bind", "exact", "importance", "mcmc", "rejection", "replicate", "score"),
        "ppl_lm.infer",
    ),
    **dict.fromkeys(("best_of_n", "conditional_smc", "particle_gibbs", "quasi_rejection", "smc"), "ppl_lm.infer"),
    **dict.fromkeys(("SequenceKernel", "exact_twist", "fit_twist", "prefix_likelihood", "tempered"), "ppl_lm.infer"),
    **dict.fromkeys(("baselines", "objectives", "off_policy", "resampling", "twists"), "ppl_lm.infer"),
    **dict.fromkeys(
        ("Calibration", "Compared", "Diagnosis", "Evidence", "PredictiveCheck", "Sensitivity"), "ppl_lm.diagnose"
    ),
    **dict.fromkeys(
        ("Verdict", "automaton_graph", "compare_models", "diversity", "draw_automaton", "draw_model"), "ppl_lm.diagnose"
    ),
    **dict.fromkeys(("draw_prefix_tree", "drawn", "ess", "frontier", "heat_html", "log_evidence"), "ppl_lm.diagnose"),
    **dict.fromkeys(
        ("model_graph", "plot_evidence", "plot_frontier", "plot_heat", "plot_sbc", "plot_training"), "ppl_lm.diagnose"
    ),
    **dict.fromkeys(
        ("plot_weight_tail", "power_scale", "predictive_check", "prefix_tree", "psis_khat", "sbc"), "ppl_lm.diagnose"
    ),
    **dict.fromkeys(("ess_se", "from_arviz", "khat_se", "max_weight"), "ppl_lm.diagnose"),
    **dict.fromkeys(("smoothed", "to_arviz", "token_gains"), "ppl_lm.diagnose"),
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
