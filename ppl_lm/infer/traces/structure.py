"""How deep programs nest their plates, found by a run that draws no text and asks no reward."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from jaxtyping import Int
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_lm.infer.counts import require_count
from ppl_lm.infer.traces.sites import is_sequence, sample_sites
from ppl_lm.likelihood.reward import preserved_rng, unasked
from ppl_lm.lm.token_sequence import TokenSequence

Program = Callable[..., Any]


def nesting_of(given: int | None, model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> int:
    """`given`, or where it is None `plate_nesting`.

    :raises ValueError: if what is given is no whole number of at least 1."""
    if given is None:
        return plate_nesting(model, guide, *args, **kwargs)
    require_count("max_plate_nesting", given)  # the prompts' plate is one
    return given


def plate_nesting(model: Program, guide: Program | None, *args: Any, **kwargs: Any) -> int:
    """How many plates lie within each other at most, the prompts' among them; at least 1. No text is drawn, no `Reward` is
    asked, random states stay what they were, and what Pyro's parameter store did not hold it does not hold after; it takes
    the programs' plates not to depend on what texts say.

    Where a program cannot go on with empty texts and rewards of 0, it is run as it is, once."""
    try:
        traces = _traces(model, guide, args, kwargs, dry=True)
    except Exception:  # of the programs' own code, on texts that were never drawn
        traces = _traces(model, guide, args, kwargs, dry=False)
    frames = [f for trace in traces for site in sample_sites(trace).values() for f in site["cond_indep_stack"]]
    return max((-f.dim for f in frames if f.vectorized), default=1)


@torch.no_grad()
def _traces(model: Program, guide: Program | None, args: Any, kwargs: Any, dry: bool) -> list[Trace]:
    with (
        preserved_rng(),
        _kept_store(),
        poutine.block(),
        ExitStack() as stack,
    ):  # handlers around this are of no concern
        if dry:
            for block in (unasked(), pyro.validation_enabled(False), _EmptyTexts()):
                stack.enter_context(block)
        if guide is None:
            return [poutine.trace(model).get_trace(*args, **kwargs)]
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        return [drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)]


@contextmanager
def _kept_store() -> Iterator[None]:
    """Parameters that are new in Pyro's store leave it: their first values may have been made of texts that nobody drew."""
    store = pyro.get_param_store()
    before = {*store.keys()}
    try:
        yield
    finally:  # of what is there now: the weights of a program that died meanwhile have left, and must not come back
        state: Any = store.get_state()
        store.clear()
        kept: Any = {part: {n: v for n, v in values.items() if n in before} for part, values in state.items()}
        store.set_state(kept)


class _EmptyTexts(Messenger):
    """Texts end at once instead of being drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_sequence(msg) and not msg["is_observed"] and not msg["done"]:
            msg["value"], msg["done"] = _empty(msg["fn"]), True


def _empty(law: TokenSequence) -> Int[Tensor, "*S T"]:
    vocabulary = law.lm.vocabulary
    x = torch.full((*law.batch_shape, *law.event_shape), vocabulary.pad_id, device=law.prompts.ids.device)
    x[..., 0] = vocabulary.end_ids[0]
    return x
