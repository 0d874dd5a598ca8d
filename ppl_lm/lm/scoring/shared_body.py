"""Networks around one body: of several heads on the same last hidden state, one pass answers for all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.head import all_logits
from ppl_lm.lm.scoring.shortcuts import PROBE, OtherHeadError, before_head, plain_head
from ppl_lm.lm.scoring.teacher_forcing import answers

Network = Any  # the `Network` that is passed, whose module imports this one


def head_on(lm: Network, other: Network) -> nn.Linear | None:
    """The head of `other` if it answers from the last hidden state of `lm`'s own pass: if both have the same frozen weights but
    for their heads, which are plain and linear, in the same modules with the same settings, compute in the same precision, and
    were found to have the same hidden states of a few tokens, which is found out once. None else."""
    mine, theirs = plain_head(lm), plain_head(other)
    if (
        mine is None
        or theirs is None
        or lm.compute_dtype != other.compute_dtype
        or not same_body(lm.model, other.model)
    ):
        return None
    known = other.shortcuts.body
    if known is None or known[0] != id(lm.model):
        other.shortcuts.body = known = id(lm.model), _same_hidden(lm, other)
    return theirs if known[1] else None


def same_body(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are the same but for the weights of their heads: the same frozen weights in the same modules, whose
    settings in numbers and words are equal, without a hook or a forward that was put on one."""
    parts = [_parts(model) for model in (one, other)]
    return None not in parts and parts[0] == parts[1]


def _parts(model: Any) -> list[Any] | None:
    """What a network's modules are, but for its head; None of one that is being trained, or does more than its class says."""
    head, found = model.get_output_embeddings(), []
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        if module is head:
            continue
        weights = [(part, weight) for part, weight in module._parameters.items() if weight is not None]
        if any(weight.requires_grad for _, weight in weights):
            return None
        settings = {k: v for k, v in vars(module).items() if k != "training" and _is_plain(v)}
        found.append((name, type(module), [(part, id(weight)) for part, weight in weights], settings))
    return found


def _is_plain(value: Any) -> bool:
    """Of what can be compared: PEFT keeps its scales in dictionaries."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@torch.no_grad()
def _same_hidden(lm: Network, other: Network) -> bool:
    count = min(lm.vocabulary.size, lm.max_positions or PROBE, PROBE)
    ids = torch.linspace(0, lm.vocabulary.size - 1, count, device=lm.device).long()[None]
    given = {"ids": ids, "mask": None, "positions": torch.arange(count, device=lm.device)[None], "keep": count}
    try:
        with meter.unmeasured():
            hidden = [
                before_head(network, network.model.get_output_embeddings())(**given)[0] for network in (lm, other)
            ]
    except Exception:  # whatever a network does where one looks into it: then it is not looked into
        return False
    return torch.equal(*hidden)


def read_by(hidden: Float[Tensor, "N H"], head: nn.Linear) -> Float[Tensor, "N V"]:
    """What a head answers, float32 or wider; with a gradient where it is trained."""
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in head.parameters()):
        logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        return all_logits(hidden, head)


@torch.no_grad()
def next_logits(
    lm: Network, own: nn.Linear, reading: Sequence[nn.Linear], compared: bool = True, **inputs: Any
) -> tuple[list[Float[Tensor, "N V"]], Any]:
    """`Network.logits_next` of a network with a plain head `own`: its own, then those of heads that read its last hidden state;
    and the cache.

    :raises OtherHeadError: if the network's answers are not those of its head."""
    with lm.precision():
        try:
            hidden, cache = before_head(lm, own, compared)(use_cache=True, **inputs)
        except OtherHeadError:
            lm.shortcuts.head = own, False
            raise
        return [all_logits(hidden[:, -1], head) for head in (own, *reading)], cache


def logits_of_both(
    lm: Network, other: Network, prompts: Prompts, x: Int[Tensor, "N T"]
) -> tuple[Float[Tensor, "N U V"], Float[Tensor, "N U V"]]:
    """`Network.next_token_logits` of both, those of `other` with a gradient, those of `lm` without; from one pass where
    both are around one body."""
    theirs = head_on(lm, other)
    if theirs is not None:
        own, steps = lm.model.get_output_embeddings(), int(lm.vocabulary.lengths(x).max())
        try:
            with lm.precision():
                with torch.no_grad():
                    hidden = answers(before_head(lm, own), lm, prompts, x, None, steps)
                    before = all_logits(hidden.flatten(0, 1), own)
                after = read_by(hidden.flatten(0, 1), theirs)
            return before.unflatten(0, hidden.shape[:2]), after.unflatten(0, hidden.shape[:2])
        except OtherHeadError:
            lm.shortcuts.head = own, False
    after = other.next_token_logits(prompts, x)
    with torch.no_grad():
        return lm.next_token_logits(prompts, x), after


@contextmanager
def given_to(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, what this thread gives to a head goes into the list."""
    seen: list[Tensor] = []
    mine = get_ident()

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if get_ident() == mine:
            seen.append(given[0])

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()
