"""Language models as Hugging Face folders: what one must be to be read, and what is written, to be read back as it was."""

import json
from pathlib import Path
from typing import Any

import torch

from ppl_lm.lm.network import Network, UnsuitableNetworkError

SETTINGS = "language_model.json"  # beside the weights: what neither they nor the tokenizer say


def require_model_folder(folder: Path, what: str) -> None:
    """Raises ValueError unless `folder` holds a whole Hugging Face model; an adapter alone is none."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not list(folder.glob("model*.safetensors")):
        base = _base(adapter)
        raise ValueError(
            f"{what} is a PEFT adapter of {base!r}, no language model of its own; merge it first: "
            f"peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r})"
            ".merge_and_unload().save_pretrained(NEW), save the tokenizer to NEW as well, and give NEW"
        )
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else []
        raise ValueError(
            f"{what} is not a Hugging Face folder: it has no config.json" + (f", but {inside}" if inside else "")
        )


def _base(adapter: Path) -> str:
    """The model that an adapter was made for, as its configuration names it."""
    try:
        return str(json.loads(adapter.read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a model that it does not name"


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

    if not isinstance(lm.model, PreTrainedModel):
        raise ValueError(
            f"{type(lm.model).__name__} is no model of transformers', which alone can be written as a folder; save the "
            "networks that it is made of, merge an adapter into its base (merge_and_unload()), or save lm.state_dict()"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give the name of a folder")
    lm.model.save_pretrained(folder)
    lm.vocabulary.tokenizer.save_pretrained(folder)
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    settings = {"max_new_tokens": lm.max_new_tokens, "end_ids": list(lm.vocabulary.end_ids), "dtype": dtype}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def saved_settings(folder: Path) -> dict[str, Any]:
    """`max_new_tokens`, `end_ids` and `dtype` of the language model that was saved there; empty where none was.

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
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
