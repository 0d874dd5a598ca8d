"""The folders of PEFT adapters, which hold no language model of their own."""

import json
from pathlib import Path


def is_adapter_folder(folder: Path) -> bool:
    """Whether it holds a PEFT adapter alone; some models lie beside theirs."""
    return (folder / "adapter_config.json").is_file() and not list(folder.glob("model*.safetensors"))


def require_adapter_folder(folder: Path) -> None:
    """Raises ValueError unless `folder` holds a PEFT adapter, as safetensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} is not the folder of a PEFT adapter: it has no {name}")


def adapter_base(folder: Path) -> str:
    """The model that an adapter was made for, as its configuration names it.

    :raises ValueError: if it names none, or a folder that is not there."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"the adapter in {str(folder)!r} names no base; load that, and give lm.adapted({str(folder)!r})"
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(
            f"the base of the adapter in {str(folder)!r} was in {base!r}, which is gone; load it from where it is now, and "
            f"give lm.adapted({str(folder)!r})"
        )
    return base


def tokenizer_folder(name_or_folder: str | Path) -> str | Path:
    """Where the tokenizer of a model is, or of an adapter: beside it, or else with its base."""
    folder = Path(name_or_folder)
    if is_adapter_folder(folder) and not (folder / "tokenizer_config.json").is_file():
        return tokenizer_folder(adapter_base(folder))
    return name_or_folder
