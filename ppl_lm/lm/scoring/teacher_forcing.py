"""Teacher forcing: log-probabilities of given texts, the prompt once for all its texts, the logits never all."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.gradient_checkpointing import checkpointed_layers
from ppl_lm.lm.scoring.head import chosen_log_probs
from ppl_lm.lm.scoring.shortcuts import OtherHeadError, before_head, plain_head

Network = Any  # the `Network` that calls, whose module imports this one
SMALL = 2**16  # numbers in a weight of which a gradient is kept twice to compare
WORTH = 8  # the prompt is passed by itself where that saves an eighth of the tokens


def score(
    lm: Network,
    prompts: Prompts,
    x: Int[Tensor, "N T"],
    rows: Int[Tensor, "N"] | None = None,
    ends: bool = False,
    shared: bool | None = None,
) -> Float[Tensor, "N T M"]:
    """log p(x_t | prompt, x_<t) of canonical completions, 0 after their ends; with `ends` also that the text ends there
    instead, with the first of the end tokens, and where it does end with its own. float32 or wider, nats.
    Differentiable in the weights.

    :param rows: of which prompt each completion is; None: one of each.
    :param shared: see `answers`."""
    if not len(x):
        return torch.zeros(*x.shape, 1 + ends, device=x.device)
    vocabulary = lm.vocabulary
    steps = int(vocabulary.lengths(x).max())
    here = x[:, :steps, None]
    if ends:
        ending = torch.where(vocabulary.is_end(here), here, vocabulary.end_ids[0])
        here = torch.cat([here, ending], -1)  # (N, U, M)
    with lm.precision():
        log_probs = _of_tokens(lm, prompts, x, rows, steps, here, shared)
    log_probs = log_probs.masked_fill(~vocabulary.alive(x)[:, :steps, None], 0.0)
    return nn.functional.pad(log_probs, (0, 0, 0, x.shape[-1] - steps))


def _of_tokens(
    lm: Network, prompts: Prompts, x: Tensor, rows: Tensor | None, steps: int, tokens: Tensor, shared: bool | None
) -> Float[Tensor, "N U M"]:
    head = plain_head(lm)
    again: dict[str, bool] = {}
    if torch.is_grad_enabled() and lm.is_too_long(prompts.ids.shape[-1], steps, head is None) and may_recompute(lm):
        again, shared = {"recompute": True}, False  # a prompt's cache is not found a second time
    if head is not None:
        try:
            call = partial(before_head(lm, head), **again)
            return chosen_log_probs(answers(call, lm, prompts, x, rows, steps, shared), head, tokens)
        except OtherHeadError:
            lm.shortcuts.head = head, False
    return normalise(answers(partial(lm.logits, **again), lm, prompts, x, rows, steps, shared)).gather(-1, tokens)


def answers(
    call: Callable[..., tuple[Tensor, Any]],
    lm: Network,
    prompts: Prompts,
    x: Int[Tensor, "N T"],
    rows: Int[Tensor, "N"] | None,
    steps: int,
    shared: bool | None = None,
) -> Float[Tensor, "N U D"]:
    """What a pass says at the positions that predict the first U = `steps` tokens of each completion.

    K texts of T tokens after a prompt of P cost P + K (T - 1) tokens, or K (P + T - 1) where the prompt is not `shared`.

    :param call: as `Network.logits`.
    :param shared: None: where the network was shown to allow it, and it saves an eighth."""
    if rows is not None and (may_share(lm, prompts, x, steps) if shared is None else shared):
        return _after_shared_prompts(call, lm, prompts, x, rows, steps)
    own = prompts if rows is None else prompts.take(rows)
    ids = torch.cat([own.ids, x[:, : steps - 1]], 1)  # (N, P + U - 1)
    mask = torch.cat([own.mask, own.mask.new_ones(len(x), steps - 1)], 1)
    padded = not bool(own.mask.all())
    return call(ids=ids, mask=mask if padded else None, positions=positions(mask), keep=steps)[0]


def _after_shared_prompts(
    call: Callable[..., Any], lm: Network, prompts: Prompts, x: Tensor, rows: Tensor, steps: int
) -> Tensor:
    """The prompts' keys and values are found once, with their gradient, and copied to the completions."""
    before, padded = prompts.mask, not bool(prompts.mask.all())
    first, cache = call(
        ids=prompts.ids,
        mask=before if padded else None,
        positions=positions(before),
        cache=lm.new_cache(),
        use_cache=True,
    )
    first = first[rows]
    if steps == 1:
        return first
    cache.batch_select_indices(rows)
    mask = torch.cat([before[rows], before.new_ones(len(x), steps - 1)], 1)
    later, _ = call(
        ids=x[:, : steps - 1],
        mask=mask if padded else None,
        positions=positions(mask)[:, before.shape[1] :],
        cache=cache,
        keep=steps - 1,
        use_cache=True,
    )
    return torch.cat([first, later], 1)


def distinct(prompts: Prompts) -> tuple[Int[Tensor, "B"], Int[Tensor, "N"]]:
    """Where each prompt stands first that is among these, and which of those each one is: by tokens."""
    tokens = torch.where(prompts.mask, prompts.ids, -1)
    _, which = tokens.unique(dim=0, return_inverse=True)
    place = torch.arange(len(which), device=which.device)
    first = torch.full((int(which.max()) + 1 if len(which) else 0,), len(which), device=which.device)
    return first.scatter_reduce(0, which, place, "amin"), which


def may_share(lm: Network, prompts: Prompts, x: Tensor, steps: int) -> bool:
    """Whether prompts are passed by themselves: where that saves enough, and a check has shown that it changes nothing."""
    width = prompts.ids.shape[-1]
    return saves(len(prompts), len(x), width, steps) and shares(lm, torch.is_grad_enabled() and steps > 1)


def saves(prompts: int, texts: int, width: int, steps: int) -> bool:
    """Whether passing prompts of `width` tokens by themselves saves an eighth of the tokens of texts of `steps` tokens."""
    return prompts < texts and (texts - prompts) * width * WORTH >= texts * (width + steps - 1)


def shares(lm: Network, gradient: bool) -> bool:
    """Whether prompts may be passed by themselves, as the self-check has shown; where there is a `gradient`, whether it
    flows back through the cache, which is found out once for what is trainable."""
    if not lm.shortcuts.prompts or not gradient:
        return bool(lm.shortcuts.prompts)
    if lm.parts:
        return all(shares(part, gradient) for part in lm.parts)
    free = _free(lm)
    if not any(free):
        return True
    if lm.shortcuts.gradients is None or lm.shortcuts.gradients[0] != free:
        lm.shortcuts.gradients = free, _same_gradients(lm, (lm.logits, True))
    return lm.shortcuts.gradients[1]


def may_recompute(lm: Network) -> bool:
    """Whether something is trainable, and gradient checkpointing gives it the same gradient, which is found out once."""
    free = _free(lm)
    if not any(free):
        return False
    if lm.shortcuts.layers is None or lm.shortcuts.layers[0] != free:
        has_layers = bool(checkpointed_layers(lm.model))
        lm.shortcuts.layers = free, has_layers and _same_gradients(lm, (partial(lm.logits, recompute=True), False))
    return lm.shortcuts.layers[1]


def _free(lm: Network) -> tuple[bool, ...]:
    return tuple(weight.requires_grad for weight in lm.parameters())


def _same_gradients(lm: Network, way: tuple[Callable[..., Any], bool]) -> bool:
    """Whether two texts of one prompt give the small ones of the trainable weights (norms, biases, adapters; some of the others
    where there are none) the same gradient in this way as in the plain one.

    :param way: how a pass is called, and whether prompts are shared, as for `answers`."""
    if lm.max_positions is not None and lm.max_positions < 6:
        return False
    free = list({id(weight): weight for weight in lm.parameters() if weight.requires_grad}.values())
    small = [weight for weight in free if weight.numel() <= SMALL] or [free[0], free[len(free) // 2], free[-1]]
    ids = torch.linspace(0, lm.vocabulary.size - 1, 9, device=lm.device).long()
    prompt = Prompts.from_ids([ids[:3].tolist()], lm.vocabulary, device=lm.device)
    texts, both = ids[3:].reshape(2, 3), torch.zeros(2, dtype=torch.int64, device=lm.device)
    slopes = []
    try:
        with meter.unmeasured(), torch.enable_grad():
            for call, shared in (way, (lm.logits, False)):
                said = normalise(answers(call, lm, prompt, texts, both, 3, shared)).gather(-1, texts[..., None])
                slopes.append(torch.autograd.grad(said.sum(), small, allow_unused=True))
    except Exception:  # whatever a network does in a pass that it need not know: then it is spared it
        return False
    pairs = [(a, b) for a, b in zip(*slopes, strict=True) if a is not None or b is not None]
    exact = 1e-3 if all(weight.dtype.itemsize >= 4 for weight in lm.parameters()) else 0.1
    return all(
        a is not None and b is not None and float((a - b).norm()) <= exact * float(b.norm()) + 1e-12 for a, b in pairs
    )


def normalise(logits: Float[Tensor, "*S V"]) -> Float[Tensor, "*S V"]:
    """Log-probabilities. Sampling and scoring both use this one function."""
    return logits.log_softmax(-1)


def positions(mask: Bool[Tensor, "N L"]) -> Int[Tensor, "N L"]:
    """Position ids that count real tokens only, whatever the padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
