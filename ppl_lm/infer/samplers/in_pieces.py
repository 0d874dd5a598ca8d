"""Many draws in pieces of a few seconds each: between two of them one can stop, and say how far it is."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from ppl_lm.infer.binding import Bound
from ppl_lm.infer.traces.layout import ROWS
from ppl_lm.lm.prompts import Prompts

Progress = Callable[[float, str], None]  # is told the share that is done, 0 to 1, and what else there is to say

WORK = 2**38  # multiplications that a piece may take on a processor: seconds
FASTER = 64  # times as many on an accelerator


def texts_a_piece(prompts: Any, *programs: Any) -> int:
    """How many texts of these programs are drawn and scored in seconds: `ROWS`, or fewer of a large network. By its size alone,
    so that a seed gives the same draws on any day."""
    bound = [program for program in programs if isinstance(program, Bound) and program.lm is not None]
    if not bound or not isinstance(prompts, Prompts):
        return ROWS
    lm = bound[0].lm
    assert lm is not None
    weights = {id(p): p.numel() for program in bound for p in program.parameters()}  # a shared one is counted once
    tokens = (prompts.ids.shape[-1] + lm.max_new_tokens) * sum(weights.values())
    return max(2, min(ROWS, WORK * (1 if lm.device.type == "cpu" else FASTER) // max(1, tokens)))


def pieces(
    most: int,
    size: int,
    least: int = 2,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Progress | None = None,
) -> Iterator[int]:
    """How many draws to make next, again and again: `most` in all, at most `size` at a time. Where `seconds` are given first
    `least`, in any case, then as many as the time that earlier ones took allows."""
    began, done, n = clock(), 0, least
    while done < most:
        if seconds == math.inf:
            n = min(size, most - done)
        elif done < least:
            n = min(size, least - done, most - done)
        else:
            spent = clock() - began
            fit = int((seconds - spent) * done / spent) if spent > 0 else size
            n = min(size, most - done, fit, 4 * n)
            if n < min(2, most - done):
                return
        yield n
        done += n
        if on_progress is not None:
            on_progress(
                max(done / most, min(1.0, (clock() - began) / max(seconds, 1e-9))), f"{done} draws of each prompt"
            )
