"""The prior: a causal language model as a Pyro distribution over whole texts."""

from ppl_lm.lm.decoder import Decoder
from ppl_lm.lm.language_model import DivergedError, LanguageModel
from ppl_lm.lm.product import product, twist_like
from ppl_lm.lm.prompts import Prompts, batches
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.lm.vocabulary import Vocabulary

__all__ = [
    "Decoder",
    "DivergedError",
    "LanguageModel",
    "Prompts",
    "TokenSequence",
    "Vocabulary",
    "batches",
    "product",
    "twist_like",
]
