"""Scoring: log-probabilities of given texts by teacher forcing, the prompt once for all its texts, the logits never all."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppl_lm.lm import meter
from ppl_lm.lm.head import chosen_log_probs, entering, scaling
from ppl_lm.lm.prompts import Prompts

Network = Any  # the `Network` that calls, whose module imports this one
WORTH = 8  # the prompt is passed by itself where that saves an eighth of the tokens
LARGE = 1000.0  # logits at which a soft cap shows


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
    head = plain_head(lm)
    if head is None:
        log_probs = normalise(answers(lm.logits, lm, prompts, x, rows, steps, shared)).gather(-1, here)
    else:
        log_probs = chosen_log_probs(answers(hidden_of(lm, head), lm, prompts, x, rows, steps, shared), head, here)
    log_probs = log_probs.masked_fill(~vocabulary.alive(x)[:, :steps, None], 0.0)
    return nn.functional.pad(log_probs, (0, 0, 0, x.shape[-1] - steps))


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
    if rows is not None and (may_share(lm, prompts, x, rows, steps) if shared is None else shared):
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


def may_share(lm: Network, prompts: Prompts, x: Tensor, rows: Tensor, steps: int) -> bool:
    """Whether prompts are passed by themselves: where that saves enough, and a check has shown that it changes nothing."""
    saved = (len(x) - len(prompts)) * prompts.ids.shape[-1]
    whole = len(x) * (prompts.ids.shape[-1] + steps - 1)
    if not lm.shares_prompts or len(prompts) == len(x) or saved * WORTH < whole:
        return False
    if not torch.is_grad_enabled():
        return True
    if lm.shares_gradients is None:
        lm.shares_gradients = _same_gradients(lm, prompts, x, rows)
    return lm.shares_gradients


def _same_gradients(lm: Network, prompts: Prompts, x: Tensor, rows: Tensor) -> bool:
    """Whether gradients flow back through the cache, by two texts of one prompt and a few of the weights."""
    free = [weight for weight in lm.parameters() if weight.requires_grad]
    few = list({id(w): w for w in (*free[:2], *free[len(free) // 2 :][:1], *free[-1:])}.values())
    if not few:
        return True
    mine = (rows == rows[0]).nonzero()[:2, 0]
    one, texts = prompts.take(rows[:1]), x[mine][:, :8]
    both = torch.zeros(2, dtype=torch.int64, device=x.device)
    texts = texts if len(mine) == 2 else texts.expand(2, -1)
    steps = max(2, min(texts.shape[-1], int(lm.vocabulary.lengths(texts).max())))
    if steps > texts.shape[-1]:
        return False
    slopes = []
    with meter.unmeasured():
        for shared in (True, False):
            said = normalise(answers(lm.logits, lm, one, texts, both, steps, shared))
            total = said.gather(-1, texts[:, :steps, None]).sum()
            slopes.append(torch.autograd.grad(total, few, allow_unused=True))
    pairs = [(a, b) for a, b in zip(*slopes, strict=True) if a is not None or b is not None]
    if any(a is None or b is None for a, b in pairs):
        return False
    exact = 1e-3 if all(w.dtype.itemsize >= 4 for w in lm.parameters()) else 0.1
    return all(float((a - b).norm()) <= exact * float(b.norm()) + 1e-12 for a, b in pairs)


def plain_head(lm: Network) -> nn.Linear | None:
    """The network's last layer if its answers are the logits as they are, and it is linear: found out once by a few tokens,
    with its answers made large, since a soft cap would hardly change small ones. None of any other."""
    find: Any = getattr(lm.model, "get_output_embeddings", None)
    head = None if find is None else find()
    if lm.head is None or lm.head[0] is not head:
        lm.head = (head, type(head) is nn.Linear and _answers_logits(lm, head))
    return head if lm.head[1] else None


@torch.no_grad()
def _answers_logits(lm: Network, head: nn.Linear) -> bool:
    count = min(lm.vocabulary.size, lm.max_positions or 4, 4)
    ids = torch.arange(count, device=lm.device)[None]
    factor = 1.0
    with meter.unmeasured():
        for _ in range(2):
            with scaling(head, factor) as seen:
                said = lm.logits(ids=ids, mask=None, positions=ids, keep=count)[0]
            if len(seen) != 1 or seen[0].shape[:2] != (1, count):
                return False
            linear = (nn.functional.linear(seen[0], head.weight, head.bias) * factor).to(said.dtype)
            if linear.shape != said.shape or not torch.allclose(linear, said, rtol=1e-5, atol=1e-5 * factor):
                return False
            factor = LARGE / max(float(said.abs().max()), 1e-6)
    return True


def hidden_of(lm: Network, head: nn.Linear) -> Callable[..., tuple[Tensor, Any]]:
    """`Network.logits`, but what is given to the head, (N, keep, H), instead of what it answers."""

    def call(keep: int = 1, **inputs: Any) -> tuple[Tensor, Any]:
        with entering(head) as seen:
            _, cache = lm.logits(keep=keep, **inputs)
        return seen[0][:, -keep:], cache

    return call


def normalise(logits: Float[Tensor, "*S V"]) -> Float[Tensor, "*S V"]:
    """Log-probabilities. Sampling and scoring both use this one function."""
    return logits.log_softmax(-1)


def positions(mask: Bool[Tensor, "N L"]) -> Int[Tensor, "N L"]:
    """Position ids that count real tokens only, whatever the padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
