"""Criticism: how close an approximation is to its posterior."""

from ppl_lm.diagnose.arviz import to_arviz, to_datatree
from ppl_lm.diagnose.compare import Compared, compare_models
from ppl_lm.diagnose.diversity import diversity
from ppl_lm.diagnose.draw_graphs import draw_automaton, draw_model
from ppl_lm.diagnose.draw_tree import draw_prefix_tree
from ppl_lm.diagnose.drawn import drawn
from ppl_lm.diagnose.evidence import Evidence, log_evidence
from ppl_lm.diagnose.frontier import frontier, plot_frontier
from ppl_lm.diagnose.graphs import automaton_graph, model_graph
from ppl_lm.diagnose.heat import heat_html, pieces, plot_heat, token_gains
from ppl_lm.diagnose.plots import plot_evidence, plot_sbc, plot_training
from ppl_lm.diagnose.predictive import PredictiveCheck, predictive_check
from ppl_lm.diagnose.prefix_tree import prefix_tree
from ppl_lm.diagnose.read_arviz import from_arviz
from ppl_lm.diagnose.samples import samples, variety
from ppl_lm.diagnose.sbc import Calibration, sbc
from ppl_lm.diagnose.sensitivity import Sensitivity, power_scale
from ppl_lm.diagnose.summary import Diagnosis, diagnose, exact_among
from ppl_lm.diagnose.tail import plot_weight_tail
from ppl_lm.diagnose.verdict import Verdict, judge
from ppl_lm.diagnose.weights import ess, ess_se, khat_se, khat_threshold, max_weight, psis_khat, smoothed

__all__ = [
    "Calibration",
    "Compared",
    "Diagnosis",
    "Evidence",
    "PredictiveCheck",
    "Sensitivity",
    "Verdict",
    "automaton_graph",
    "compare_models",
    "diagnose",
    "diversity",
    "draw_automaton",
    "draw_model",
    "draw_prefix_tree",
    "drawn",
    "ess",
    "ess_se",
    "exact_among",
    "from_arviz",
    "frontier",
    "heat_html",
    "judge",
    "khat_se",
    "khat_threshold",
    "log_evidence",
    "max_weight",
    "model_graph",
    "pieces",
    "plot_evidence",
    "plot_frontier",
    "plot_heat",
    "plot_sbc",
    "plot_training",
    "plot_weight_tail",
    "power_scale",
    "predictive_check",
    "prefix_tree",
    "psis_khat",
    "samples",
    "sbc",
    "smoothed",
    "to_arviz",
    "to_datatree",
    "token_gains",
    "variety",
]
