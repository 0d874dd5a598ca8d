"""What a folder or a configuration must be, so that a language model can be read from it."""

import json
from pathlib import Path
from typing import Any

from ppl_lm.lm.network import UnsuitableNetworkError


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
