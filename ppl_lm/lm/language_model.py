"""`LanguageModel`: a Hugging Face causal LM as the prior over whole texts."""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppl_lm.embedded import FOLDER
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.vocabulary import Vocabulary, text_config

if TYPE_CHECKING:
    from ppl_lm.lm.token_sequence import TokenSequence


class LanguageModel(nn.Module):
    """p(x | prompt) = Π_t p(x_t | prompt, x_<t), over completions x of at most `max_new_tokens` tokens.

    `lm(prompts)` is a Pyro distribution over token ids (`TokenSequence`). The model's own `generation_config` never
    shapes it: temperature 1, the whole vocabulary, dropout off. It is born frozen, as a prior should be; `copy()` is
    trainable.

    :param model: a Hugging Face causal LM (any module with `config` whose forward takes `input_ids`, `attention_mask`,
        `position_ids`, `past_key_values` and returns `logits`).
    :param max_new_tokens: T; a completion that reaches T tokens without an end token is *truncated*, an outcome of
        its own.
    :param end_ids: the ids that end a text; by default every one that the model's configuration, its
        generation_config or the tokenizer names.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_new_tokens: int, end_ids: Iterable[int] | None = None):
        super().__init__()
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}; give a whole number of tokens, at least 1")
        self.model = model.eval().requires_grad_(False)
        config: Any = model.config
        self.vocabulary = Vocabulary.of(tokenizer, config, getattr(model, "generation_config", None), end_ids)
        config = text_config(config)
        self.max_new_tokens = max_new_tokens
        self.is_checked = False  # set by self_check
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.networks: int = getattr(model, "networks", 1)  # that one forward pass is counted as
        self.width: int = getattr(config, "hidden_size", 0) * getattr(
            config, "num_hidden_layers", 1
        )  # activations a token

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = FOLDER,
        max_new_tokens: int = 40,
        *,
        end_ids: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LanguageModel":
        """A frozen LM from a folder or a hub name; without one, the small LM that ships with the package.

        Checks itself before it is returned (`self_check`).

        :raises ValueError: if weights are missing, unexpected, misshapen or not finite, or if the model scores its own
            samples differently from how it drew them.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        what, folder = f"lm={str(name_or_folder)!r}", Path(name_or_folder)
        on_the_hub = isinstance(name_or_folder, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_folder)
        if (folder.exists() or not on_the_hub) and not (folder / "config.json").is_file():
            raise ValueError(f"{what} is not a Hugging Face folder: it has no config.json")
        state = torch.random.get_rng_state()
        try:
            with quiet():  # what transformers' report of the weights warns of is refused below
                tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
                model: Any
                model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                    name_or_folder,
                    dtype=dtype,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers, safetensors and the hub have dozens
            raise ValueError(f"{what} could not be loaded: {error}") from error
        finally:
            torch.random.set_rng_state(state)
        for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if report.get(fault):
                raise ValueError(f"{what}: weights with {fault}: {sorted(map(str, report[fault]))}")
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{what}: weight {name!r} holds NaN or infinite values")
        lm = cls(model.to(device or default_device()), tokenizer, max_new_tokens, end_ids)
        lm.self_check()
        return lm

    def forward(self, prompts: Any) -> "TokenSequence":
        """The distribution over completions of `prompts` (strings, chats, a dataset, or `Prompts`)."""
        from ppl_lm.lm.token_sequence import TokenSequence

        return TokenSequence(self, self.prompts(prompts))

    def prompts(self, prompts: Any) -> Prompts:
        return Prompts.make(prompts, self.vocabulary, self.device)

    @property
    def device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def copy(self) -> "LanguageModel":
        """A trainable copy that shares nothing but the vocabulary."""
        vocabulary = self.vocabulary
        twin = LanguageModel(
            copy.deepcopy(self.model), vocabulary.tokenizer, self.max_new_tokens, end_ids=vocabulary.end_ids
        )
        twin.vocabulary, twin.is_checked = vocabulary, self.is_checked
        return twin.requires_grad_(True)

    def self_check(self, prompts: Any = None, tolerance: float = 2e-3) -> float:
        """Draws a few tokens and scores them again: alone, in a padded batch, step by step and in one pass.

        :returns: the largest difference between two log-probabilities of the same token, in nats.
        :raises ValueError: if it exceeds `tolerance`; such a model would be sampled from one distribution and scored
            under another.
        """
        from ppl_lm.lm.checks import self_check

        return self_check(self, prompts, tolerance)

    @torch.no_grad()
    def logits_next(self, **inputs: Any) -> tuple[Float[Tensor, "N V"], Any]:
        """One step: logits of the next token and the cache after it; see `logits`."""
        logits, cache = self.logits(keep=1, use_cache=True, **inputs)
        return logits[:, -1], cache

    def new_cache(self) -> Any:
        """An empty cache of keys and values, for `logits_next`."""
        from ppl_lm.lm.cache import Cache

        own = getattr(self.model, "new_cache", None)  # of networks made of several
        config: Any = self.model.config
        return Cache(config=config) if own is None else own()

    def logits(
        self,
        *,
        ids: Int[Tensor, "N L"],
        mask: Tensor | None,
        positions: Int[Tensor, "N L"],
        cache: Any = None,
        keep: int = 1,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "N keep V"], Any]:
        """Logits at the last `keep` positions in float32 or wider, dropout off. Every forward pass goes through here.

        :param mask: (N, cached + L) True at real tokens; None where nothing is padded.
        """
        meter.add(lm_tokens=ids.numel() * self.networks)
        with evaluating(self.model):
            out = self.model(
                input_ids=ids,
                attention_mask=None if mask is None else mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
                logits_to_keep=keep,
            )
        logits = out.logits[:, -keep:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), out.past_key_values

    def score(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        """log p(x_t | prompt, x_<t) for one canonical completion a prompt, in one teacher-forced pass; 0 after the
        end. float32 or wider, nats. Differentiable in the weights."""
        if not len(x):
            return torch.zeros(x.shape, device=x.device)
        log_probs = self.next_token_log_probs(prompts, x)
        return self._until_end(log_probs.gather(-1, x[:, : log_probs.shape[1], None]).squeeze(-1), x)

    def score_with_ends(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> tuple[Tensor, Tensor]:
        """`score`, and from the same pass the log-probability that the text ends there instead, with the first of the end
        tokens; where it does end, with its own."""
        log_probs = self.next_token_log_probs(prompts, x)
        here = x[:, : log_probs.shape[1], None]
        token = log_probs.gather(-1, here).squeeze(-1)
        end = torch.where(self.vocabulary.is_end(here), here, min(self.vocabulary.end_ids))
        ends = log_probs.gather(-1, end).squeeze(-1)
        return self._until_end(token, x), self._until_end(ends, x)

    def _until_end(self, by_token: Float[Tensor, "N S"], x: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        steps = by_token.shape[1]
        by_token = by_token.masked_fill(~self.vocabulary.alive(x)[:, :steps], 0.0)
        return nn.functional.pad(by_token, (0, x.shape[-1] - steps))

    def next_token_log_probs(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> Float[Tensor, "N S V"]:
        """log p(v | prompt, x_<t) of every token v, at every position up to the length S of the longest completion.
        What stands after a completion's end means nothing. float32 or wider, nats. Differentiable in the weights."""
        return normalise(self.next_token_logits(prompts, x))

    def next_token_logits(self, prompts: Prompts, x: Int[Tensor, "N T"]) -> Float[Tensor, "N S V"]:
        """What the network answers at the same places; see `next_token_log_probs` and `Decoder.logits`."""
        steps = int(self.vocabulary.lengths(x).max())
        ids = torch.cat([prompts.ids, x[:, : steps - 1]], 1)  # (N, P + steps - 1)
        prompt_mask = prompts.mask
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(x), steps - 1)], 1)
        logits, _ = self.logits(
            ids=ids, mask=None if bool(prompt_mask.all()) else mask, positions=positions(mask), keep=steps
        )
        return logits

    def rows_per_pass(self, width: int, steps: int, gradient: bool = False) -> int:
        """How many sequences one pass takes, so that its logits and activations stay within a memory budget."""
        budget = 2**31 if self.device.type == "cuda" else 2**27  # bytes
        hidden = self.width * (24 if gradient else 2)
        floats = steps * self.vocabulary.size * (3 if gradient else 2) + (width + steps) * hidden
        return max(1, budget // (4 * floats))


class DivergedError(ValueError):
    """A language model's weights have diverged: it answers NaN."""

    def __init__(self, message: str = "the language model's logits hold NaN or infinite values; its weights diverged"):
        super().__init__(message)  # Pyro raises errors again with a longer message


def normalise(logits: Tensor) -> Tensor:
    """Log-probabilities. Sampling and scoring both use this one function."""
    return logits.log_softmax(-1)


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, whatever the padding. (N, L) bool -> (N, L) int64."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports from transformers inside the block."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; the mode of every submodule restored on the way out, also on exceptions."""
    training = [m for m in module.modules() if m.training]
    if not training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
