"""One base, many networks: a PEFT adapter in a structural copy of a network, whose other weights *are* the network's own."""

import copy
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ppl_lm.lm.checking.adapter_folders import require_adapter_folder
from ppl_lm.lm.trainable_weights import adapter_weights

KEEPING = (True, False, "gaussian", "orthogonal")  # of PEFT's ways to begin LoRA those that leave the base as it is


def lora_config(rank: int) -> Any:
    """LoRA of this rank in every linear layer but the head, with the scale 2 (α = 2 · rank)."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank={rank!r}; give a whole number, at least 1")
    LoraConfig = _peft().LoraConfig
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def with_adapter(base: nn.Module, config: Any) -> nn.Module:
    """A copy of the modules of `base` around the same weights, with a new adapter in it, which alone is trainable.

    :param config: a `PeftConfig`.
    :raises ValueError: if `base` has an adapter of its own, is being trained, or has a `forward` that is not its class's own;
        or if the adapter would change or train weights of `base`, or PEFT refuses it."""
    peft = _peft()
    if not isinstance(config, peft.PeftConfig):
        raise ValueError(f"an adapter is described by a peft.PeftConfig or a folder; got {config!r}")
    _require_adaptable(base)
    begin = getattr(config, "init_lora_weights", True)
    if begin not in KEEPING:
        raise ValueError(
            f"init_lora_weights={begin!r} changes the base's weights, which are the prior's own; give True"
        )
    if dropout := getattr(config, "lora_dropout", 0.0):
        warnings.warn(f"lora_dropout={dropout} is off: what is sampled is what is scored", stacklevel=3)
    theirs = {id(weight) for weight in base.parameters()}
    twin = around_same_weights(base)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = getattr(base, "name_or_path", None)
    try:
        with warnings.catch_warnings():  # which way round a layer keeps its weights, found out by PEFT itself
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(config, twin)
    except Exception as error:  # PEFT has dozens
        raise ValueError(f"this adapter does not fit {type(base).__name__}: {error}") from error
    shared = [name for name, weight in twin.named_parameters() if weight.requires_grad and id(weight) in theirs]
    if shared:
        base.requires_grad_(False)
        raise ValueError(
            f"the adapter would train {shared[0]!r} of the base itself, which is the prior's; give bias='none'"
        )
    for weight in adapter_weights(twin):
        weight.requires_grad_(True)
    for weight in adapter_weights(twin, copies=False):
        if weight.dtype.itemsize < 4:  # steps are smaller than half precision can tell
            weight.data = weight.data.float()
    if hasattr(twin, "add_adapter"):
        # A network of transformers', which would else write the base's weights too, under names that no one reads.
        twin._hf_peft_config_loaded = True
    return twin


def around_same_weights(base: nn.Module) -> Any:
    """A copy of its modules around its own weights.

    :raises ValueError: if one of them has a `forward` that is not its class's own, which the copy would share."""
    name = type(base).__name__
    if wrapped := [path or name for path, module in base.named_modules() if "forward" in vars(module)]:
        raise ValueError(
            f"this {name} cannot be shared: {wrapped[0]!r} has a forward that was put on it (torch.compile, accelerate, a "
            "wrapper), which would go on with this one's own layers; give the plain network"
        )
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


def save_adapter(model: Any, folder: Path) -> None:
    """Writes what `with_adapter` has put into a network as a PEFT folder, without its base."""
    config = copy.deepcopy(next(iter(model.peft_config.values())))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {f"base_model.model.{name}": weight.detach().contiguous().cpu() for name, weight in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """`with_adapter`, and the adapter's weights are those in a PEFT folder.

    :raises ValueError: if they are not those of this adapter on this base, by name."""
    peft = _peft()
    require_adapter_folder(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise ValueError(f"the adapter in {str(folder)!r} could not be read: {error}") from error
    config.inference_mode = False
    twin = with_adapter(base, config)
    weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    expected = peft.get_peft_model_state_dict(twin, save_embedding_layers=False)
    if wrong := sorted(set(weights) ^ set(expected)):
        raise ValueError(
            f"the adapter in {str(folder)!r} is not one of this {type(base).__name__}: {wrong[0]!r} is in "
            f"{'the folder' if wrong[0] in weights else 'the network'} alone"
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"the adapter in {str(folder)!r} is not one of this {type(base).__name__}: {name!r} has the shape "
                f"{tuple(weight.shape)} and not {tuple(expected[name].shape)}"
            )
    peft.set_peft_model_state_dict(twin, weights)
    return twin


def _require_adaptable(base: nn.Module) -> None:
    name = type(base).__name__
    if adapter_weights(base) or hasattr(base, "peft_config"):
        raise ValueError(
            f"this {name} has an adapter of its own; merge it into its base first (merge_and_unload()), "
            "or go on with the run that fitted it (--init-from)"
        )
    if any(weight.requires_grad for weight in base.parameters()):
        raise ValueError(
            f"this {name} is being trained, and an adapter would share its weights; adapt the frozen prior"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("adapters need peft: pip install 'ppl_lm[peft]'") from None
    return peft
