"""A language model whose rare events are known: the next token depends on the last one alone, and P(so many letters a) is found
by dynamic programming."""

import math
from collections import Counter

import torch

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import TableConfig, TableForCausalLM, table_lm


class Bigram(TableForCausalLM):
    """The next token depends on the last one alone."""

    def first_row(self, length):
        return self.config.vocab_size

    def rows(self, ids, mask):
        return ids


def bigram(steps: int) -> tuple[LanguageModel, list[float]]:
    """The model, of texts of up to so many letters a and b, and log P(at least c letters a), c = 0, 1, ..., steps."""
    probs = torch.tensor([[0.45, 0.53, 0.02], [0.25, 0.72, 0.03], [0.3, 0.65, 0.05]], dtype=torch.float64)
    network = Bigram(TableConfig(3, steps + 2, bos_token_id=2, eos_token_id=2, pad_token_id=2))
    with torch.no_grad():
        network.table.copy_(probs.log())
    open_, count = {(2, 0): 1.0}, Counter()  # by last token and letters a; of those that have ended by letters a
    for _ in range(steps):
        grown = Counter()
        for (last, seen), p in open_.items():
            for token in (0, 1):
                grown[(token, seen + (token == 0))] += p * float(probs[last, token])
            count[seen] += p * float(probs[last, 2])
        open_ = grown
    for (_, seen), p in open_.items():
        count[seen] += p
    tail = [math.log(sum(p for seen, p in count.items() if seen >= c)) for c in range(steps + 1)]
    return LanguageModel(network, table_lm(3, 2).vocabulary.tokenizer, steps), tail
