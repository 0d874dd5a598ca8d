"""Shortcuts of scoring: each is taken only by networks of which a check has shown that it changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ppl_lm.lm import meter

Network = Any  # the `Network` whose module imports this one
LARGE = 1000.0  # logits at which a soft cap shows
PROBE = 32  # tokens


@dataclass
class Shortcuts:
    """What was found out of one network; None: nothing yet."""

    prompts: bool | None = None  # a prompt may be passed once for all its texts: shown by the self-check
    gradients: tuple[tuple[bool, ...], bool] | None = None  # so too with a gradient; of which weights that was found
    head: tuple[Any, bool] | None = None  # the last layer, and whether its answers are the logits as they are
    layers: tuple[tuple[bool, ...], bool] | None = None  # likewise, activations may be found again in the backward pass
    steps: bool | None = None  # a decoder's steps may be recorded, see `decoding.recorded_steps`
    body: tuple[int, bool] | None = (
        None  # whether it is around the body of another one, see `shared_body`; the `id` of that
    )


class OtherHeadError(RuntimeError):
    """The answers of a network are not those of its last layer."""

    def __init__(self) -> None:
        super().__init__("what follows the network's last layer was changed while texts were drawn; draw them again")


def plain_head(lm: Network) -> nn.Linear | None:
    """The network's last layer if its answers are the logits as they are, and it is linear. None of any other, of networks
    whose forward is not transformers' own, and where a hook stands between.

    Found out once by a few tokens of all the vocabulary, with the answers made large, since a soft cap would hardly change
    small ones; every later pass looks at one position again, see `before_head`."""
    find: Any = getattr(lm.model, "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not nn.Linear or not all(map(_is_untouched, (lm.model, head))):
        return None
    if lm.shortcuts.head is None or lm.shortcuts.head[0] is not head:
        lm.shortcuts.head = head, _answers_logits(lm, head)
    return head if lm.shortcuts.head[1] else None


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module does what its class in torch or transformers says, and nothing else."""
    if hasattr(module, "get_base_model"):  # PEFT's wrapper, which hands on whatever it is given
        module = module.get_base_model()  # pyright: ignore[reportCallIssue]
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and type(module).forward.__module__.startswith(("torch.nn.", "transformers."))


@torch.no_grad()
def _answers_logits(lm: Network, head: nn.Linear) -> bool:
    count = min(lm.vocabulary.size, lm.max_positions or PROBE, PROBE)
    ids = torch.linspace(0, lm.vocabulary.size - 1, count, device=lm.device).long()[None]
    given = {"ids": ids, "mask": None, "positions": torch.arange(count, device=lm.device)[None], "keep": count}
    change: Callable[[Tensor], Tensor] = lambda answer: answer  # noqa: E731
    factor = 1.0
    try:
        with meter.unmeasured(), lm.precision():
            for _ in range(2):
                with _changing(head, change) as seen:
                    said = lm.logits(**given)[0]
                (hidden,) = seen
                linear = change(nn.functional.linear(hidden, head.weight, head.bias)).to(said.dtype)
                if linear.shape != said.shape or not _same(linear, said, factor):
                    return False
                size = float(said.abs().max())
                if not size < torch.inf:
                    return False
                change, factor = _large(size), LARGE / size if size > 0 else 1.0
            before_head(lm, head)(**given)
    except Exception:  # whatever a network does where one looks into it: then it is not looked into
        return False
    return True


def _large(size: float) -> Callable[[Tensor], Tensor]:
    """Makes answers of this size large; of a head that answers zeros, as a new twist's, numbers of which some are large."""

    def change(answer: Tensor) -> Tensor:
        if size > 0:
            return answer * (LARGE / size)
        return answer + torch.linspace(-LARGE, LARGE, answer.shape[-1], dtype=answer.dtype, device=answer.device)

    return change


def before_head(lm: Network, head: nn.Linear, compared: bool = True) -> Callable[..., tuple[Tensor, Any]]:
    """`Network.logits`, but what is given to the head, (N, keep, H), instead of what it answers.

    The head answers the last position of the first text alone, and that is compared with what the network makes of it.

    :param compared: whether that is done; else the head answers nothing.
    :raises OtherHeadError: if they differ, so that the answers must be taken as they are."""

    def call(keep: int = 1, **inputs: Any) -> tuple[Tensor, Any]:
        with _entering(head, int(compared)) as seen:
            said, cache = lm.logits(keep=keep, **inputs)
        if len(seen) != 1:
            raise OtherHeadError
        hidden = seen[0][:, -keep:]
        if not compared:
            return hidden, cache
        with torch.no_grad():
            linear = nn.functional.linear(seen[0][:1, -1:], head.weight, head.bias).to(said.dtype)
            if linear.shape != said.shape or not _same(linear, said, 1.0):
                raise OtherHeadError
        return hidden, cache

    return call


def _same(linear: Tensor, said: Tensor, factor: float) -> bool:
    return torch.allclose(linear, said, rtol=1e-5, atol=1e-5 * factor, equal_nan=True)


@contextmanager
def _entering(head: nn.Module, texts: int) -> Iterator[list[Tensor]]:
    """Inside the block, what this thread gives to a head goes into the list, and it answers the last position of so many
    texts."""
    seen: list[Tensor] = []
    mine = get_ident()

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if get_ident() != mine:
            return given
        seen.append(given[0])
        return (given[0][:texts, -1:], *given[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _changing(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Inside the block, what this thread gives to a head goes into the list, and its answers are changed."""
    seen: list[Tensor] = []
    mine = get_ident()

    def put(_: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        if get_ident() != mine:
            return answer
        seen.append(given[0])
        return change(answer)

    handle = head.register_forward_hook(put)
    try:
        yield seen
    finally:
        handle.remove()
