"""`LanguageModel`: a Hugging Face causal LM as the prior over whole texts."""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppl_lm.embedded import FOLDER
from ppl_lm.lm.adapters import around_same_weights, load_adapter, lora_config, with_adapter
from ppl_lm.lm.checking.adapter_folders import adapter_base, is_adapter_folder, tokenizer_folder
from ppl_lm.lm.checking.checks import one_pass, require_same_start, self_check
from ppl_lm.lm.checking.copies import require_own_weights
from ppl_lm.lm.checking.folders import (
    base_fingerprint,
    require_base,
    require_causal,
    require_model_folder,
    save,
    saved_settings,
)
from ppl_lm.lm.checking.precision import noise_between
from ppl_lm.lm.network import Network
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.lm.trainable_weights import frozen_weights
from ppl_lm.lm.vocabulary import text_config


class LanguageModel(Network):
    """p(x | prompt) = Π_t p(x_t | prompt, x_<t), over completions x of at most `max_new_tokens` tokens.

    `lm(prompts)` is a Pyro distribution over token ids (`TokenSequence`). The model's own `generation_config` never
    shapes it: temperature 1, the whole vocabulary, dropout off. It is born frozen, as a prior should be; `copy()` is
    trainable.

    :param model: a Hugging Face causal LM, or any module with a `config` (its `vocab_size`, the number of logits, and
        where it has them `eos_token_id` and `max_position_embeddings`) whose forward takes `input_ids` (N, L),
        `attention_mask` (N, cached + L; None where nothing is padded), `position_ids` (N, L) and `past_key_values`, and
        returns an object with `logits` (N, L, V) and `past_key_values`. The latter is empty in a first call, then what
        the call before returned; it is a transformers `Cache`, to be filled by `update(keys, values, layer)` with (N,
        heads, L, width), or what the module's own `new_cache()` gives, with a method `batch_select_indices(rows)`. Of
        `use_cache` and `logits_to_keep` (logits of the last positions are enough) a forward may take what it knows.
    :param max_new_tokens: T; a completion that reaches T tokens without an end token is *truncated*, an outcome of
        its own.
    :param end_ids: the ids that end a text; by default every one that the model's configuration, its
        generation_config or the tokenizer names.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = FOLDER,
        max_new_tokens: int | None = None,
        *,
        end_ids: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LanguageModel":
        """A frozen LM from a folder or a hub name; without one, the small LM that ships with the package. From the folder of a
        PEFT adapter: its base, loaded from where the adapter says, with the adapter in it.

        Checks itself before it is returned (`self_check`).

        :param max_new_tokens: None: as many as it was saved with (`save_pretrained`), else 40; `end_ids` likewise, else those
            that the folder's files name; `dtype` likewise, else float32. In half precision a text's log-ratio is uncertain by
            about `noise` · √T nats, which the self-check measures, and `copy` against what it is a copy of.
        :raises ValueError: if weights are missing, unexpected, misshapen or not finite, or if the model scores its own
            samples differently from how it drew them.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        what, folder = f"lm={str(name_or_folder)!r}", Path(name_or_folder)
        given = {"end_ids": end_ids, "device": device, "dtype": dtype}
        if is_adapter_folder(folder):
            return cls._from_adapter(folder, max_new_tokens, given)
        on_the_hub = isinstance(name_or_folder, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_folder)
        if folder.exists() or not on_the_hub:
            require_model_folder(folder, what)
        saved = saved_settings(folder)
        length: int = saved.get("max_new_tokens", 40) if max_new_tokens is None else max_new_tokens
        end_ids, dtype = (
            saved.get("end_ids") if end_ids is None else end_ids,
            dtype or saved.get("dtype", torch.float32),
        )
        state = torch.random.get_rng_state()
        try:
            with quiet():  # what transformers' report of the weights warns of is refused below
                tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
                require_causal(AutoConfig.from_pretrained(name_or_folder))
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
        lm = cls(model.to(device or default_device()), tokenizer, length, end_ids)
        lm.compute_dtype = saved.get("compute_dtype") if dtype == torch.float32 else None
        one_pass(lm)
        for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if report.get(fault):
                raise ValueError(
                    f"{what}: weights of {lm.architecture} with {fault}: {sorted(map(str, report[fault]))}"
                )
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{what}: weight {name!r} holds NaN or infinite values")
        lm.self_check()
        lm.noise = max(lm.noise, saved.get("noise", 0.0) if lm.compute_dtype is not None else 0.0)
        return lm

    @classmethod
    def _from_adapter(cls, folder: Path, max_new_tokens: int | None, given: dict[str, Any]) -> "LanguageModel":
        from transformers import AutoTokenizer

        saved, place = saved_settings(folder), adapter_base(folder)
        given = {name: saved.get(name) if value is None else value for name, value in given.items()}
        length = saved.get("max_new_tokens", 40) if max_new_tokens is None else max_new_tokens
        try:
            lm = cls.from_pretrained(place, length, **given)
        except ValueError as error:
            raise ValueError(f"the base of the adapter in {str(folder)!r}: {error}") from error
        lm = lm.adapted(folder)
        if tokenizer_folder(folder) == folder:
            base_sha256 = lm.base_sha256
            lm = cls(lm.model, AutoTokenizer.from_pretrained(folder), length, given["end_ids"])
            lm.self_check()
            lm.base_sha256 = base_sha256
        return lm.requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder with weights and tokenizer, which `from_pretrained(folder)` reads back as it was, and
        transformers too; of an `adapted` network a PEFT folder, with the adapter alone and the hash of its base. Of a fitted
        guide: `guide.lm.save_pretrained(folder)`.

        :raises ValueError: if the network is none of transformers' own, such as a product."""
        with quiet():
            save(self, Path(folder))

    def forward(self, prompts: Any) -> TokenSequence:
        """The distribution over completions of `prompts` (strings, chats, a dataset, or `Prompts`)."""
        return TokenSequence(self, self.prompts(prompts))

    def copy(self) -> "LanguageModel":
        """A trainable copy that shares nothing but the vocabulary. What is frozen while other weights are trained stays frozen
        in it, and so does what was frozen when the network was given; of an adapted network the adapter alone is trainable. Of
        a network in half precision the weights that are trained are float32, since steps are smaller than half precision can
        tell, and products stay in half precision.

        :raises ValueError: if the copy's forward pass would still read weights of the original, as with a `forward` that
            `torch.compile` or another wrapper put on the network."""
        twin = self._around(copy.deepcopy(self.model))
        require_own_weights(twin.model, self.model, lambda: one_pass(twin))
        being_trained = any(weight.requires_grad for weight in self.model.parameters())
        twin.frozen = frozen_weights(self.model) if being_trained else self.frozen
        for name, weight in twin.model.named_parameters():
            weight.requires_grad_(name not in twin.frozen)
            if weight.requires_grad and weight.is_floating_point() and weight.itemsize < 4:
                twin.compute_dtype, weight.data = weight.dtype, weight.data.float()
        twin.base_sha256 = self.base_sha256
        if twin.compute_dtype != self.compute_dtype:
            twin.noise = max(twin.noise, noise_between(self, twin))
        return twin

    def adapted(self, adapter: Any = None, *, rank: int = 16) -> "LanguageModel":
        """This network with a PEFT adapter, which alone is trainable: a copy of its modules around the same weights, so that
        they lie in memory once and the prior stays as it is by construction. It begins as the prior (LoRA: exactly, its second
        matrix being 0), and is never merged. The first matrices are random, from torch's global generator.

        :param adapter: a `peft.PeftConfig`; a folder that holds a fitted adapter of this network; or None: LoRA in every linear
            layer but the head, with the scale 2 (α = 2 · rank).
        :param rank: of that LoRA.
        :raises ValueError: if this network has an adapter already or is being trained, or a forward was put on it; if the rank
            is higher than the network is wide; if the adapter would train or change this network's own weights, begins
            elsewhere than at the prior, or is none of it.
        :raises ImportError: without `peft`: `pip install 'ppl_lm[peft]'`.
        """
        if isinstance(adapter, str | Path):
            require_base(Path(adapter), base_fingerprint(self.model))
            twin = self._around(load_adapter(self.model, Path(adapter)))
        else:
            widest = getattr(text_config(self.model.config), "hidden_size", rank)  # pyright: ignore
            if adapter is None and type(rank) is int and rank > widest:
                raise ValueError(f"rank={rank}; this network is {widest} wide, and a higher rank adds nothing")
            twin = self._around(with_adapter(self.model, lora_config(rank) if adapter is None else adapter))
            require_same_start(self, twin)
        shared = {id(weight) for weight in self.model.parameters()}
        for weight in twin.model.parameters():
            weight.requires_grad_(id(weight) not in shared)
        twin.base_sha256 = base_fingerprint(self.model)
        return twin

    def around_same_weights(self) -> "LanguageModel":
        """A copy of this network's modules around the same weights, frozen ones: to be given another head, say.

        :raises ValueError: if a forward was put on one of them, or a weight is being trained."""
        if any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError("this network is being trained; share the weights of one that is frozen")
        twin = self._around(around_same_weights(self.model))
        twin.base_sha256 = self.base_sha256
        return twin

    def _around(self, model: nn.Module) -> "LanguageModel":
        """A language model with the same vocabulary and length around another network of the same law or kind."""
        vocabulary = self.vocabulary
        twin = LanguageModel(model, vocabulary.tokenizer, self.max_new_tokens, end_ids=vocabulary.end_ids)
        twin.vocabulary, twin.crossed = vocabulary, dict(self.crossed)
        twin.is_checked, twin.tolerance = self.is_checked, self.tolerance
        twin.shortcuts.prompts, twin.boundaries = self.shortcuts.prompts, dict(self.boundaries)
        twin.max_positions, twin.networks, twin.width = self.max_positions, self.networks, self.width
        twin.compute_dtype, twin.noise = self.compute_dtype, self.noise
        return twin

    def self_check(self, prompts: Any = None, tolerance: float | None = None) -> float:
        """Draws a few tokens and scores them again: alone, in a padded batch, step by step and in one pass.

        It is done at load, by `bind`, and at the latest when prompts are first given. Where a prompt and `max_new_tokens`
        reach beyond a length that the configuration names (a sliding window, an attention chunk, the original context of a
        stretched rotary embedding), texts that cross it are checked as well, once.

        :param prompts: to be checked with, and with all lengths that they reach; None: a few tokens.
        :param tolerance: nats; None: 0.002, or 0.5 in half precision, where `noise` then says what rounding does to a token of
            a text: the root mean square of the difference, in nats.
        :returns: the largest difference between two log-probabilities of the same token, in nats.
        :raises ValueError: if it exceeds `tolerance`; such a model would be sampled from one distribution and scored
            under another. Also if the network fails, or is no causal language model.
        """
        return self_check(self, prompts, tolerance)


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


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
