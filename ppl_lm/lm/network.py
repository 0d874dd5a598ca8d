"""`Network`: next-token logits of a causal network, and the log-probabilities of whole texts."""

import inspect
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppl_lm.lm import meter
from ppl_lm.lm.checking.lengths import boundaries, context_length
from ppl_lm.lm.decoding import cache as caches
from ppl_lm.lm.dropout import evaluating
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring import teacher_forcing as scoring
from ppl_lm.lm.scoring.gradient_checkpointing import recomputing
from ppl_lm.lm.scoring.shared_body import next_logits
from ppl_lm.lm.scoring.shortcuts import Shortcuts, plain_head
from ppl_lm.lm.trainable_weights import frozen_weights
from ppl_lm.lm.vocabulary import Vocabulary, text_config

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


class UnsuitableNetworkError(ValueError):
    """A network that is no causal language model as this library needs one; the message says why."""


class DivergedError(ValueError):
    """A language model's weights have diverged: it answers NaN."""

    def __init__(self, message: str = "the language model's logits hold NaN or infinite values; its weights diverged"):
        super().__init__(message)  # Pyro raises errors again with a longer message


class Network(nn.Module):
    """A causal network with its vocabulary and the length of its texts: what decoders step and distributions score. See
    `LanguageModel`, which is one. Born frozen.

    Every forward pass goes through `logits`: the model's own `generation_config` never shapes what is drawn or scored."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_new_tokens: int, end_ids: Iterable[int] | None = None):
        super().__init__()
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}; give a whole number of tokens, at least 1")
        config: Any = getattr(model, "config", None)
        self.inputs = inputs_of(model)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsuitableNetworkError(f"{type(model).__name__} is an encoder-decoder, no causal language model")
        if type(getattr(text_config(config), "vocab_size", None)) is not int:
            raise UnsuitableNetworkError(
                f"{type(model).__name__} has no config.vocab_size; give it a `config` with the number of its logits"
            )
        self.frozen = frozen_weights(model)  # names of those that a copy does not train either
        self.model = model.eval().requires_grad_(False)
        self.shortcuts = Shortcuts()  # of scoring; found out when it matters
        self.parts: tuple[Network, ...] = ()  # the networks that it is made of, see `combined`
        self.base_sha256: str | None = None  # of the network around whose weights an adapter was put
        self.vocabulary = Vocabulary.of(tokenizer, config, getattr(model, "generation_config", None), end_ids)
        config = text_config(config)
        self.max_new_tokens = max_new_tokens
        self.compute_dtype: torch.dtype | None = None  # of matrix products, where it is not that of the weights
        self.is_checked = False  # set by self_check
        self.noise = 0.0  # nats a token, by which rounding moves a log-ratio (root mean square); measured by self_check
        self.tolerance: float | None = None  # nats, of the check that it has passed
        self.max_positions = context_length(config)
        self.boundaries = boundaries(config)  # lengths where the law may change, see checks
        self.crossed: dict[tuple[int, bool, bool], str] = {}  # what was found out there
        self.networks: int = getattr(model, "networks", 1)  # that one forward pass is counted as
        self.width: int = getattr(config, "hidden_size", 0) * getattr(
            config, "num_hidden_layers", 1
        )  # activations a token

    def prompts(self, prompts: Any) -> Prompts:
        return Prompts.make(prompts, self.vocabulary, self.device)

    def completions(self, texts: str | Iterable[str]) -> Int[Tensor, "B T"]:
        """Token ids of given texts as this network's completions, for `obs=` and `log_prob`: (B, T) int64, each with its end
        token (the first of `end_ids`) and padding, as the tokenizer alone would cut the text up.

        A text of exactly T tokens has no end token and pays for none: it is one that has begun. So a first text that a second
        one goes on from, and that is to be a beginning rather than a whole, comes from a network with its length as
        `max_new_tokens`: `LanguageModel(lm.model, tokenizer, n)`; what ends earlier has chosen to end.

        :raises ValueError: if a text is empty, has more than T tokens, or is not what its ids say."""
        given = [texts] if isinstance(texts, str) else list(texts)
        rows = [self.vocabulary.completion(text, self.max_new_tokens, f"text {i}") for i, text in enumerate(given)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(len(rows), self.max_new_tokens)

    @property
    def device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    @torch.no_grad()
    def logits_next(self, compared: bool = True, **inputs: Any) -> tuple[Float[Tensor, "N V"], Any]:
        """One step: logits of the next token and the cache after it; see `logits`. On a processor the product of a plain head
        is made here, where few rows take a third to nine tenths of the time.

        :param compared: whether what the network itself makes of one row is compared with that.
        :raises OtherHeadError: if they differ; from then on the network's answers are taken as they are."""
        head = plain_head(self) if inputs["ids"].device.type == "cpu" else None
        if head is None:
            logits, cache = self.logits(keep=1, use_cache=True, **inputs)
            return logits[:, -1], cache
        (logits,), cache = next_logits(self, head, (), compared, **inputs)
        return logits, cache

    def new_cache(self) -> Any:
        """An empty cache of keys and values, for `logits_next`."""
        return caches.new_cache(self.model)

    def logits(
        self,
        *,
        ids: Int[Tensor, "N L"],
        mask: Bool[Tensor, "N cached_and_L"] | Float[Tensor, "N 1 L room"] | None,
        positions: Int[Tensor, "N L"],
        cache: Any = None,
        keep: int = 1,
        use_cache: bool = False,
        recompute: bool = False,
    ) -> tuple[Float[Tensor, "texts kept V"], Any]:
        """Logits at the last `keep` positions in float32 or wider, (N, keep, V), dropout off. Every forward pass goes through
        here, also those of which the head is to answer less (`before_head`).

        :param mask: (N, cached + L) True at real tokens; None where nothing is padded; or what is added to the attention's
            scores, (N, 1, L, room).
        :param recompute: activations are found again in the backward pass; without a cache.
        :raises UnsuitableNetworkError: if the network answers no logits, logits of another number than its vocabulary has,
            or no cache where it was asked for one.
        """
        meter.add(lm_tokens=ids.numel() * self.networks)
        marked = mask.long() if mask is not None and mask.dtype == torch.bool else mask
        given = (ids, marked, positions, cache, use_cache, keep)
        with evaluating(self.model), self.precision(), recomputing(self.model) if recompute else nullcontext():
            named = zip(INPUTS, given, strict=True)
            out = self.model(**{self.inputs[name]: value for name, value in named if name in self.inputs})
        logits, past, name = getattr(out, "logits", None), past_of(out), self.architecture
        if logits is None:
            raise UnsuitableNetworkError(f"{name} answers with {type(out).__name__}, which has no `logits`")
        if logits.shape[-1] != self.vocabulary.size:
            raise UnsuitableNetworkError(
                f"{name} answers {logits.shape[-1]} logits, but its configuration says vocab_size={self.vocabulary.size}; "
                f"set config.vocab_size to {logits.shape[-1]}, or cut the head: model.resize_token_embeddings(...)"
            )
        if use_cache and past is None:
            encoder = getattr(text_config(self.model.config), "is_decoder", None) is False
            raise UnsuitableNetworkError(
                f"{name} is no causal language model: its configuration says is_decoder=False"
                if encoder
                else f"{name} cannot be continued: asked for `past_key_values`, it answered without"
            )
        logits = logits[:, -keep:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), past

    def precision(self) -> AbstractContextManager[Any]:
        """Inside the block, matrix products are of `compute_dtype`; the outermost such block converts each weight once."""
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    @property
    def architecture(self) -> str:
        """The network's class, for messages."""
        return type(self.model).__name__

    def score(
        self, prompts: Prompts, x: Int[Tensor, "N T"], rows: Int[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N T"]:
        """log p(x_t | prompt, x_<t) of canonical completions; 0 after the end. float32 or wider, nats. Differentiable in the
        weights.

        :param rows: of which prompt each completion is; None: one of each."""
        return scoring.score(self, prompts, x, rows)[..., 0]

    def score_with_ends(
        self, prompts: Prompts, x: Int[Tensor, "N T"], rows: Int[Tensor, "N"] | None = None
    ) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """`score`, and from the same pass the log-probability that the text ends there instead, with the first of the end
        tokens; where it does end, with its own."""
        token, end = scoring.score(self, prompts, x, rows, ends=True).unbind(-1)
        return token, end

    def next_token_log_probs(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> Float[Tensor, "N U V"]:
        """log p(v | prompt, x_<t) of every token v, at every position up to the length U of the longest completion.
        What stands after a completion's end means nothing. float32 or wider, nats. Differentiable in the weights."""
        return scoring.normalise(self.next_token_logits(prompts, x))

    def next_token_logits(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> Float[Tensor, "N U V"]:
        """What the network answers at the same places; see `next_token_log_probs` and `Decoder.logits`."""
        return scoring.answers(self.logits, self, prompts, x, None, int(self.vocabulary.lengths(x).max()))

    def rows_per_pass(
        self, width: int, steps: int, gradient: bool = False, logits: bool = True, shared: float = 0.0
    ) -> int:
        """How many texts one pass takes, so that what it holds stays within a share of the memory: a power of two, so that the
        parts of many texts are as large as a step of few is.

        :param width: tokens of the prompt; `steps`: of the text.
        :param logits: whether those of all tokens are formed at every step.
        :param shared: the number of texts for which a prompt is passed once; 0: each has its own."""
        fitting = budget(self, self.device) / self._held(width, steps, gradient, logits, shared)
        return 2 ** int(math.log2(max(1.0, fitting)))

    def is_too_long(self, width: int, steps: int, logits: bool = True) -> bool:
        """Whether what a pass of one such text holds for its gradient is more than a quarter of the memory."""
        return self._held(width, steps, True, logits) > memory(self.device) / 4

    def _held(self, width: int, steps: int, gradient: bool, logits: bool, shared: float = 0.0) -> float:
        """Bytes that a pass holds for each text; see `rows_per_pass`."""
        activations = self.width * (24 if gradient else 2)
        before = 4 * self.width + activations / shared if shared else activations  # keys and values, and their copies
        answers = self.vocabulary.size * (3 if gradient else 2) if logits else 0
        return 4 * (steps * (answers + activations) + width * before)


def budget(network: nn.Module, device: torch.device) -> int:
    """Bytes that one pass may hold. On CUDA an eighth of the device's memory. Elsewhere twice what the weights take, which
    each pass reads once, but at least 128 MiB, beyond which small networks slow down, and at most a sixteenth of the memory."""
    if device.type == "cuda":
        return memory(device) // 8
    weights = sum(weight.numel() * weight.itemsize for weight in network.parameters())
    return min(max(2**27, 2 * weights), max(2**27, memory(device) // 16))


def memory(device: torch.device) -> int:
    """Bytes that a device has; where the system does not say, 8 GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**33


@dataclass(frozen=True)
class Answer:
    """What networks of this package answer."""

    logits: Float[Tensor, "N keep V"]
    past_key_values: Any


def past_of(answer: Any) -> Any:
    """What a network is given with the next tokens: `past_key_values`, since transformers 5.24 `cache`."""
    return answer.cache if hasattr(answer, "cache") else getattr(answer, "past_key_values", None)


def inputs_of(model: nn.Module) -> dict[str, str]:
    """Those of `INPUTS` that the forward of `model` takes, each with its name there.

    :raises UnsuitableNetworkError: if it names its inputs, and `past_key_values` is not among them."""
    if hasattr(model, "get_base_model"):  # PEFT's wrapper hands on whatever it is given
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsuitableNetworkError(
                "soft prompts are given anew at every step, and cannot be continued; give LoRA"
            )
        return inputs_of(model.get_base_model())  # pyright: ignore[reportCallIssue]
    parameters = inspect.signature(model.forward).parameters
    own = {name: name for name in INPUTS}
    if "cache" in parameters and "past_key_values" not in parameters:
        own["past_key_values"] = "cache"
    if "input_ids" in parameters and own["past_key_values"] not in parameters:
        past = [name for name in parameters if name.startswith(("cache_params", "state", "mems", "past"))]
        under = f" (it keeps {', '.join(past)})" if past else ""
        raise UnsuitableNetworkError(
            f"{type(model).__name__} takes no `past_key_values`{under}: encoders, and recurrent networks with a state of "
            "their own, are not supported; give a causal language model whose forward takes past_key_values"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return own
    return {name: theirs for name, theirs in own.items() if theirs in parameters}
