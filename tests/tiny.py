"""Tiny random language models with the real architectures, and tokenizers made on the spot: nothing is downloaded."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.table import TableConfig, TableForCausalLM

TEXTS = ["the soup was good and the bread was warm", "she said that it was fine", "a dog ran over the hill"]
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|end|>"]
KINDS = ["gpt2", "llama", "qwen2", "mistral"]

CHAT = (
    "<s>{% for m in messages %}<|user|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def bpe(template: str | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 pieces; ids 0 to 4 are `SPECIAL`. `template` is what is put around a text: "<s> $A </s>"."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    if template is not None:
        named = [(token, SPECIAL.index(token)) for token in SPECIAL if token in template]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **kwargs}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|user|>", "<|end|>"],
        **{name: token for name, token in names.items() if token is not None},
    )


def network(kind: str, dropout: float = 0.0, seed: int = 0, **overrides: Any) -> Any:
    """Two layers, four heads (two of keys and values where that exists), random weights that make a peaked law."""
    common = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.25}
    rotary = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
        **overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
            return GPT2LMHeadModel(GPT2Config(**{**common, **size, **drop, **overrides}))
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**rotary))
        if kind == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**rotary))
        return MistralForCausalLM(MistralConfig(**{"sliding_window": 4, **rotary}))


def language_model(kind: str = "llama", max_new_tokens: int = 8, **overrides: Any) -> LanguageModel:
    return LanguageModel(network(kind, **overrides), bpe(), max_new_tokens)


def table(
    size: int, steps: int, ends: Any, pad: int | None = None, max_prompt: int = 2, bos: int | None = None, **kwargs: Any
) -> LanguageModel:
    """A random table over the letters a, b, ... that ends at any of `ends`; no letter is special to the tokenizer."""
    words = {chr(ord("a") + i): i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = TableConfig(size, max_prompt + steps, eos_token_id=ends, pad_token_id=pad, bos_token_id=bos)
    made = TableForCausalLM(config)
    with torch.no_grad():
        made.table.copy_(torch.randn(made.table.shape, generator=torch.Generator().manual_seed(1)) * 1.5)
    return LanguageModel(made, PreTrainedTokenizerFast(tokenizer_object=backend), steps, **kwargs)
