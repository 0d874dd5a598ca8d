"""`table_lm`: a language model that is a table of logits, one row for each prefix. For teaching, tests and exact work.

It is a Hugging Face module with a key-value cache (the cache holds the token ids), so that it runs through the same
code as a real model."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ppl_lm.lm.decoding.cache import Cache
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.network import Answer

MAX_ROWS = 4_000_000


class TableConfig(PretrainedConfig):
    model_type = "ppl_lm_table"

    def __init__(self, vocab_size: int = 5, max_position_embeddings: int = 8, **kwargs: Any):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class TableForCausalLM(PreTrainedModel):
    """p(next | prefix) = softmax(table[prefix]), for prefixes of fewer than `max_position_embeddings` tokens."""

    config_class = TableConfig

    def __init__(self, config: TableConfig):
        super().__init__(config)
        rows = self.first_row(config.max_position_embeddings)
        if rows > MAX_ROWS:
            raise ValueError(
                f"a table over prefixes of {config.vocab_size} tokens at {config.max_position_embeddings} positions has "
                f"{rows:.2g} rows; at most {MAX_ROWS} fit: this guide is for tiny vocabularies, use finetuned"
            )
        self.table = nn.Parameter(torch.zeros(rows, config.vocab_size, dtype=torch.float64))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:  # zeros: uniform
        pass

    def first_row(self, length: int) -> int:
        """Row of the first prefix of `length` tokens: prefixes are ordered by length, then as numbers in base V."""
        return sum(self.config.vocab_size**n for n in range(length))

    def rows(self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
        """Row of the prefix that ends at each position, padding skipped."""
        size = self.config.vocab_size
        first = torch.tensor([self.first_row(n) for n in range(ids.shape[1] + 1)], device=ids.device)
        code, length, out = ids.new_zeros(len(ids)), ids.new_zeros(len(ids)), []
        for token, real in zip(ids.unbind(1), mask.bool().unbind(1), strict=True):
            code = torch.where(real, code * size + token, code)
            length = length + real
            out.append(first[length] + code)
        return torch.stack(out, 1)

    def forward(
        self,
        input_ids: Int[Tensor, "N L"],
        attention_mask: Int[Tensor, "N cached_and_L"] | None = None,
        position_ids: Int[Tensor, "N L"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Answer:
        ids = input_ids[:, None, :, None]  # shaped as one layer's keys: (N, heads = 1, L, width = 1)
        if past_key_values is not None:
            ids, _values = past_key_values.update(ids, ids, 0)
        ids = ids[:, 0, :, 0]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        rows = self.rows(ids, mask)[:, -input_ids.shape[1] :][:, -logits_to_keep:]
        return Answer(self.table[rows], past_key_values)


AutoConfig.register("ppl_lm_table", TableConfig)
AutoModelForCausalLM.register(TableConfig, TableForCausalLM)


def table_lm(
    vocab_size: int, max_new_tokens: int, *, max_prompt: int = 1, concentration: float | None = None, seed: int = 0
) -> LanguageModel:
    """A tiny frozen LM over the letters a, b, c, ... and the token `<end>`, the last id, which is BOS, EOS and pad in one.

    :param max_prompt: longest prompt in tokens, BOS included.
    :param concentration: each row is a draw from a symmetric Dirichlet; None: uniform rows.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    _require_room(max_prompt)
    if not 2 <= vocab_size <= 27:
        raise ValueError(f"vocab_size={vocab_size}; give 2 to 27 (letters and the end token)")
    words = [chr(ord("a") + i) for i in range(vocab_size - 1)] + ["<end>"]
    end = vocab_size - 1
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
    config = TableConfig(vocab_size, max_prompt + max_new_tokens, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = TableForCausalLM(config)
    if concentration is not None:
        generator = torch.Generator().manual_seed(seed)
        shape = torch.full(model.table.shape, concentration, dtype=torch.float64)
        gamma = torch._standard_gamma(shape, generator)  # pyright: ignore[reportPrivateImportUsage]
        with torch.no_grad():
            model.table.copy_(gamma.log() - gamma.sum(-1, keepdim=True).log())
    return LanguageModel(model, tokenizer, max_new_tokens)


def table_like(
    lm: LanguageModel, max_prompt: int = 1, network: type[TableForCausalLM] = TableForCausalLM
) -> LanguageModel:
    """A trainable uniform table with the vocabulary and length of `lm`.

    :param network: of another kind, say one that forgets: which row of the table is whose prefix."""
    _require_room(max_prompt)
    ends = lm.vocabulary.end_ids
    config = TableConfig(
        lm.vocabulary.size,
        max_prompt + lm.max_new_tokens,
        bos_token_id=lm.vocabulary.bos_id,
        eos_token_id=list(ends),
        pad_token_id=lm.vocabulary.pad_id,
    )
    table = LanguageModel(network(config), lm.vocabulary.tokenizer, lm.max_new_tokens, end_ids=ends)
    table.vocabulary = lm.vocabulary
    return table.to(lm.device).requires_grad_(True)


def _require_room(max_prompt: Any) -> None:
    if type(max_prompt) is not int or max_prompt < 1:
        raise ValueError(f"max_prompt={max_prompt!r}; give a whole number of tokens, at least 1")
