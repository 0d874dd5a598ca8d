"""Criticism: how close an approximation is to its posterior."""

from ppl_lm.diagnose.arviz import to_arviz, to_datatree
from ppl_lm.diagnose.drawn import drawn
from ppl_lm.diagnose.evidence import Evidence, log_evidence
from ppl_lm.diagnose.sbc import Calibration, sbc
from ppl_lm.diagnose.summary import Diagnosis, diagnose
from ppl_lm.diagnose.verdict import Verdict, judge
from ppl_lm.diagnose.weights import ess, khat_threshold, psis_khat, smoothed

__all__ = [
    "Calibration",
    "Diagnosis",
    "Evidence",
    "Verdict",
    "diagnose",
    "drawn",
    "ess",
    "judge",
    "khat_threshold",
    "log_evidence",
    "psis_khat",
    "sbc",
    "smoothed",
    "to_arviz",
    "to_datatree",
]
