"""Language models as Hugging Face folders: what one must be to be read, and what is written, to be read back as it was."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_lm.lm.adapters import save_adapter
from ppl_lm.lm.network import Network, UnsuitableNetworkError
from ppl_lm.lm.trainable_weights import adapter_weights

SETTINGS = "language_model.json"  # beside the weights: what neither they nor the tokenizer say


def require_model_folder(folder: Path, what: str) -> None:
    """Raises ValueError unless `folder` holds a Hugging Face model."""
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []
        raise ValueError(
            f"{what} is not a Hugging Face folder: it has no config.json" + (f", but {inside}" if inside else "")
        )


def require_base(folder: Path, sha256: str) -> None:
    """Raises ValueError if an adapter was saved here with the hash of another base."""
    theirs = saved_settings(folder).get("base_sha256")
    if theirs not in (None, sha256):
        raise ValueError(
            f"the adapter in {str(folder)!r} was fitted to another base than this one, or to one of another dtype: their "
            f"weights have the hashes {theirs[:8]} and {sha256[:8]}"
        )


def fingerprint(network: nn.Module) -> str:
    """A hash of each weight's name, shape and first 1,024 numbers."""
    return _hash(_shown(name, weight) for name, weight in network.state_dict().items())


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the shape and the first 1,024 numbers of each weight that is no adapter's, whatever PEFT has named it."""
    adapters = {id(weight) for weight in adapter_weights(model)}
    return _hash(sorted(_shown("", weight) for weight in model.parameters() if id(weight) not in adapters))


def _shown(name: str, weight: Tensor) -> bytes:
    return (
        repr((name, tuple(weight.shape))).encode() + weight.detach().flatten()[:1024].double().cpu().numpy().tobytes()
    )


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def require_causal(config: Any) -> None:
    """Raises UnsuitableNetworkError unless transformers knows a causal language model of this configuration."""
    from transformers import AutoModelForCausalLM

    named = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    if getattr(config, "is_encoder_decoder", False):
        raise UnsuitableNetworkError(f"{named} is an encoder-decoder, no causal language model")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsuitableNetworkError(
            f"{named} is no causal language model: transformers has none of model type {config.model_type!r}"
        )


def save(lm: Network, folder: Path) -> None:
    """See `LanguageModel.save_pretrained`."""
    from transformers import PreTrainedModel  # takes long

    if not isinstance(lm.model, PreTrainedModel) and not hasattr(lm.model, "get_base_model"):  # PEFT's wrapper
        raise ValueError(
            f"{type(lm.model).__name__} is no model of transformers', which alone can be written as a folder; save the "
            "networks that it is made of, or lm.state_dict()"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give the name of a folder")
    if lm.base_sha256 is None:
        save_network: Any = lm.model.save_pretrained
        save_network(folder)
    else:
        if base_fingerprint(lm.model) != lm.base_sha256:
            raise ValueError(
                "weights of the base were trained beside the adapter, which alone would be saved: train the adapter "
                "alone, or give PEFT the layers as modules_to_save"
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(lm.model, folder)
    lm.vocabulary.tokenizer.save_pretrained(folder)
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    settings: dict[str, Any] = {
        "max_new_tokens": lm.max_new_tokens,
        "end_ids": list(lm.vocabulary.end_ids),
        "dtype": dtype,
    }
    if lm.compute_dtype is not None:
        settings["compute_dtype"], settings["noise"] = str(lm.compute_dtype).removeprefix("torch."), lm.noise
    if lm.base_sha256 is not None:
        settings["base_sha256"] = lm.base_sha256
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def saved_settings(folder: Path) -> dict[str, Any]:
    """`max_new_tokens`, `end_ids`, `dtype`, `compute_dtype` and `noise` of the language model that was saved there,
    `base_sha256` of an adapted one; empty where none was.

    :raises ValueError: if the file is damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {
            "max_new_tokens": int(settings["max_new_tokens"]),
            "end_ids": [int(i) for i in settings["end_ids"]],
            "dtype": getattr(torch, settings["dtype"]),
            "compute_dtype": getattr(torch, settings["compute_dtype"]) if "compute_dtype" in settings else None,
            "base_sha256": settings.get("base_sha256"),
            "noise": float(settings.get("noise", 0.0)),
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
