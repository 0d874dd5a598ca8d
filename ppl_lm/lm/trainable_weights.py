"""Which weights of a network are to be trained, and which are not."""

import sys

from torch import nn


def frozen_weights(model: nn.Module) -> set[str]:
    """Names of the weights of a network that are not to be trained: those that are frozen while others are not; if all are,
    those that are no adapter's where it has adapters, else none."""
    weights = dict(model.named_parameters())
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    if len(frozen) < len(weights):
        return frozen
    adapters = {id(weight) for weight in adapter_weights(model)}
    return {name for name, weight in weights.items() if adapters and id(weight) not in adapters}


def adapter_weights(model: nn.Module, copies: bool = True) -> list[nn.Parameter]:
    """The weights of the adapters that PEFT has put into a network, in order; none where there are none.

    :param copies: those too of modules that PEFT has copied whole, as in `modules_to_save`, which compute in their own dtype.
    """
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        is_copy = isinstance(module, AuxiliaryTrainingWrapper) or "ln_tuning_layers" in getattr(
            module, "adapter_layer_names", ()
        )
        if is_copy and not copies:
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            kept = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
            inside = {id(weight) for weight in kept.parameters()}
            found |= {id(weight): weight for weight in module.parameters() if id(weight) not in inside}
    return list(found.values())
