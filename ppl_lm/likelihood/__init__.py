"""The evidence: what the text is conditioned on."""

from ppl_lm.likelihood import rewards
from ppl_lm.likelihood.automata import Automaton
from ppl_lm.likelihood.best_of import BestOf
from ppl_lm.likelihood.optimality import Optimality
from ppl_lm.likelihood.reward import Reward, RewardError, RewardTimeout

__all__ = ["Automaton", "BestOf", "Optimality", "Reward", "RewardError", "RewardTimeout", "rewards"]
