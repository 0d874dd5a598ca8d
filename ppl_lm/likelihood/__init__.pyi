from . import rewards as rewards
from .automata import Automaton as Automaton
from .best_of import BestOfN as BestOfN
from .checker import Checker as Checker
from .optimality import Optimality as Optimality
from .weighted_rewards import WeightedRewards as WeightedRewards
from .reward import Reward as Reward, RewardError as RewardError, RewardTimeout as RewardTimeout
