"""The checks of a network before it is used: what is sampled is what is scored, alone and beside other texts."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ppl_lm.lm import meter
from ppl_lm.lm.checking.lengths import require_room
from ppl_lm.lm.checking.tolerances import TOLERANCE, tolerance_of
from ppl_lm.lm.decoding.decoder import Decoder, invert
from ppl_lm.lm.network import DivergedError, Network, UnsuitableNetworkError
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.teacher_forcing import normalise, score

STEPS = 6
STEPS_AT_BOUNDARY = 12  # what goes wrong there may show a few tokens later


def self_check(lm: Network, prompts: Any = None, tolerance: float | None = None) -> float:
    """See `LanguageModel.self_check`. Leaves the global random states alone, and is not counted as cost."""
    one_pass(lm)
    tolerance = tolerance_of(lm) if tolerance is None else tolerance
    if prompts is None:
        differences = _differences_within(lm, lm.max_positions or 1024)
        near = min((n for n in lm.boundaries if n > 2), default=STEPS + 4)
        if near < STEPS + 4 and not all(d <= tolerance for d in differences):
            differences = _differences_within(lm, near)  # who goes beyond is refused by require_fit
    else:
        batch = lm.prompts(prompts).flatten()
        if not len(batch):
            raise ValueError("the self-check got no prompts; give at least one, or None for its own")
        require_room(batch.ids.shape[-1], lm.max_new_tokens, lm.max_positions)
        require_one_law(lm, batch)
        differences = _differences(lm, batch, STEPS)
    if not all(d <= tolerance for d in differences):  # also catches NaN
        raise ValueError(
            f"{lm.architecture} is sampled from one distribution and scored under another: {_describe(differences)}; "
            f"tolerance {tolerance:.2g}. Inference with it would be wrong; try float32 weights, or report the architecture"
        )
    lm.is_checked, lm.tolerance = True, tolerance
    return max(differences)


def require_fit(lm: Network, prompts: Prompts) -> None:
    """Raises ValueError unless `lm` can be trusted with completions of these prompts: there are positions for them, it has
    passed the self-check, and its law does not change at a length that they cross. What was found is remembered."""
    require_room(prompts.ids.shape[-1], lm.max_new_tokens, lm.max_positions)
    if lm.tolerance is None:
        self_check(lm)
    require_one_law(lm, prompts)


def require_one_law(lm: Network, prompts: Prompts) -> None:
    """Raises ValueError if the law changes at a length that completions of these prompts cross."""
    reach = prompts.ids.shape[-1] + lm.max_new_tokens
    crossed = [n for n in lm.boundaries if n < reach]
    if not crossed or not prompts.lengths.numel():
        return
    shortest, longest = int(prompts.lengths.min()), int(prompts.lengths.max())
    for boundary in crossed:
        key = (boundary, shortest <= boundary, longest > boundary)
        if key not in lm.crossed:
            lm.crossed[key] = _fault_at(lm, prompts, boundary, shortest, longest)
        if lm.crossed[key]:
            raise ValueError(
                f"{lm.architecture} changes its law at {boundary} tokens ({lm.boundaries[boundary]} in its configuration): "
                f"{lm.crossed[key]}. Prompts of {shortest} to {longest} tokens and max_new_tokens={lm.max_new_tokens} "
                f"reach {reach} tokens: keep prompt and max_new_tokens within {boundary}"
            )


def one_pass(lm: Network) -> None:
    """A step from one token, as the first step of a draw.

    :raises UnsuitableNetworkError: with the cause, if the network fails."""
    try:
        with meter.unmeasured():
            Decoder(lm, Prompts.from_ids([[lm.vocabulary.end_ids[0]]], lm.vocabulary, device=lm.device))
    except (DivergedError, UnsuitableNetworkError):
        raise
    except Exception as error:  # whatever a network of any kind raises
        raise UnsuitableNetworkError(f"{lm.architecture} {_failure(error)}") from error


@torch.no_grad()
def require_same_start(base: Network, adapted: Network) -> None:
    """Raises ValueError unless a network with a new adapter says what its base does of a few tokens."""
    vocabulary = base.vocabulary
    ids = torch.arange(min(vocabulary.size, base.max_positions or STEPS, STEPS), device=base.device)[None]
    given: Any = {"ids": ids, "mask": None, "positions": torch.arange(ids.shape[1], device=base.device)[None]}
    with meter.unmeasured():
        before, after = (normalise(lm.logits(**given, keep=ids.shape[1])[0]) for lm in (base, adapted))
    worst = float((before - after).abs().nan_to_num().max())
    if not worst <= tolerance_of(base):
        raise ValueError(
            f"this adapter begins {worst:.2g} nats a token from the prior; give one that begins as no change, such as LoRA "
            "with init_lora_weights=True"
        )


def _differences_within(lm: Network, room: int) -> tuple[float, float]:
    """`_differences` of completions of two prompts of one to four tokens, where there are `room` positions."""
    vocabulary, steps = lm.vocabulary, min(lm.max_new_tokens, STEPS, room - 1)
    start = [vocabulary.bos_id] if vocabulary.bos_id is not None else [vocabulary.end_ids[0]]
    middle = [i for i in range(vocabulary.size) if i not in vocabulary.end_ids][:: max(1, vocabulary.size // 5)]
    rows = [start, start + middle[: max(0, min(3, room - steps - 1))]]
    return _differences(lm, Prompts.from_ids(rows, vocabulary, device=lm.device), steps)


def _fault_at(lm: Network, prompts: Prompts, boundary: int, shortest: int, longest: int) -> str:
    """What is wrong where texts cross `boundary` tokens, "" if nothing: step by step from below it, and beyond it in one
    pass; beside a prompt that is as short as the shortest one, or just beyond the boundary where that is."""
    texts = sorted(prompts.flatten().unpadded(), key=len)
    short, steps = min(shortest, boundary + 1), lm.max_new_tokens
    lengths = []
    if shortest <= boundary and steps > 1:
        lengths.append(max(short, boundary - min(2, steps - 2)))
    if longest > boundary:
        lengths.append(min(longest, boundary + 3))
    for length in lengths:
        long = (list(texts[-1]) + _filling(lm, length))[:length]
        batch = Prompts.from_ids([texts[0][:short], long], lm.vocabulary, device=lm.device)
        try:
            differences = _differences(lm, batch, STEPS_AT_BOUNDARY)
        except ValueError as error:
            return str(error)
        if not all(d <= (lm.tolerance or TOLERANCE) for d in differences):
            return _describe(differences)
    return ""


def _filling(lm: Network, count: int) -> list[int]:
    """Random ids of plain tokens. A text that repeats itself would hide what a network forgets."""
    special = {*lm.vocabulary.end_ids, *getattr(lm.vocabulary.tokenizer, "all_special_ids", ())}
    plain = torch.tensor([i for i in range(lm.vocabulary.size) if i not in special] or [lm.vocabulary.end_ids[0]])
    return plain[torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(0))].tolist()


@torch.no_grad()
def _differences(lm: Network, batch: Prompts, steps: int) -> tuple[float, float]:
    """The largest differences, in nats, between log-probabilities of the same token, for completions of a few tokens that
    are drawn step by step: drawn against scored in one pass, and scored alone against beside the others.

    Rows are copied, replaced and dropped on the way, as particles are.

    :raises ValueError: with the cause, if the network fails."""
    room = (lm.max_positions or 2**31) - batch.ids.shape[-1]
    steps, generator = min(lm.max_new_tokens, steps, room), torch.Generator().manual_seed(0)
    u = torch.rand(2 * len(batch), steps, dtype=torch.float64, generator=generator).to(lm.device)
    try:
        with meter.unmeasured():
            rows = torch.arange(len(batch), device=lm.device)  # which prompt each row continues
            x, drawn = rows.new_empty(len(rows), 0), u.new_empty(len(rows), 0)
            decoder = Decoder(lm, batch)
            for t in range(steps):
                log_probs = decoder.log_probs()
                tokens = invert(log_probs, u[: len(rows), t]).unsqueeze(-1)
                x, drawn = torch.cat([x, tokens], 1), torch.cat([drawn, log_probs.gather(-1, tokens).double()], 1)
                if t < steps - 1:
                    kept = _ancestors(t, len(rows)).to(lm.device)
                    rows, x, drawn = rows[kept], x[kept], drawn[kept]
                    decoder.reorder(kept)
                    decoder.advance(x[:, -1])
            drawn = drawn.masked_fill(~lm.vocabulary.alive(x), 0.0)
            together = lm.score(batch.take(rows), x)
            alone = torch.cat([lm.score(batch.take(r), c) for r, c in zip(rows.split(1), x.split(1), strict=True)])
    except (DivergedError, UnsuitableNetworkError):
        raise
    except Exception as error:
        raise ValueError(f"{lm.architecture} {_failure(error)}") from error
    alive = lm.vocabulary.alive(x)
    lm.noise = max(lm.noise, float((drawn - together)[alive].square().mean().sqrt()))
    if lm.shortcuts.prompts is not False:
        lm.shortcuts.prompts = _shares_prompts(lm, batch, x, rows, together)
    return float((drawn - together).abs().max()), float((alone - together).abs().max())


def _shares_prompts(lm: Network, batch: Prompts, x: Tensor, rows: Tensor, right: Tensor) -> bool:
    """Whether a prompt may be passed once for all its texts; else each is scored with one of its own."""
    try:
        with meter.unmeasured():
            found = score(lm, batch, x, rows, shared=True)[..., 0]
    except Exception:  # whatever a network does in a pass that it need not know: then it is spared it
        return False
    return float((found - right).abs().max()) <= (lm.tolerance or TOLERANCE) / 10


def _ancestors(t: int, count: int) -> Int[Tensor, "M"]:
    """Which row each row continues after step t: all are doubled, then one takes another's place, then some are dropped."""
    rows = torch.arange(count)
    if t == 0:
        return torch.cat([rows, rows.flip(0)])
    if t == 1:
        return rows.clamp_min(1)
    return rows[(rows < 2) | (rows > count // 2)] if t == 2 else rows


def _describe(differences: tuple[float, float]) -> str:
    scored, alone = differences
    return (
        f"the same token's log-probability differs by {max(differences):.2g} nats (sampled step by step against scored in "
        f"one pass {scored:.2g}, alone against beside other texts {alone:.2g})"
    )


def _failure(error: Exception) -> str:
    return f"fails in a forward pass: {type(error).__name__}: {str(error)[:300]}"
