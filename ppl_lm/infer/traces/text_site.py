"""A text site of a program: its law without a draw from it, its law at given values, and a value put in its place."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_lm.infer.traces.layout import Given
from ppl_lm.infer.traces.particles import as_particles
from ppl_lm.infer.traces.sites import TextSite, is_record, is_sequence
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.token_sequence import TokenSequence


class Resumed(Messenger):
    """The guide's text site draws `value` anew from `start` on, instead of all of it."""

    def __init__(self, name: str, value: Int[Tensor, "*S T"], start: Int[Tensor, "*S"]):
        super().__init__()
        self.name, self.value, self.start = name, value, start

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not msg["done"]:
            msg["value"], msg["done"] = msg["fn"].resume(self.value, self.start), True


def text_law(program: Callable[..., Any], prompts: Any) -> TokenSequence:
    """The distribution from which a program draws its text, batch shape (B,), found by running the program up to there.

    :raises ValueError: if it draws something else first, or no text."""
    try:
        with _BeforeText():
            program(prompts)
    except _Left as left:
        return left.site["fn"]
    raise ValueError("this program draws no text; SMC grows one text a prompt")


def text_at(
    program: Callable[..., Any], latents: dict[str, Tensor], prompts: Prompts, name: str, max_plate_nesting: int
) -> TextSite:
    """The text site `name` of a program at given values of its latent sites, (S, B, *inner, *event), found by running the
    program up to there: rewards are not called.

    :raises ValueError: if it has no text of that name."""
    count = len(latents[name])
    try:
        with _AtText(name), Given(latents, max_plate_nesting):
            as_particles(program, count, max_plate_nesting)(prompts)
    except _Left as left:
        return TextSite.of(left.site)
    raise ValueError(f"a program has no text at the site {name!r}; give the model and the guide of these draws")


class TextIs(Messenger):
    """The text site takes this value, whatever its law.

    :param token_log_probs: of the value under that law where they are known, so that it need not score it again."""

    def __init__(self, value: Int[Tensor, "*S T"], token_log_probs: Float[Tensor, "*S T"] | None = None):
        super().__init__()
        self.value, self.token_log_probs = value, token_log_probs

    def _pyro_sample(self, msg: Any) -> None:
        if is_sequence(msg) and not msg["is_observed"] and not msg["done"]:
            if self.token_log_probs is not None:
                msg["fn"].recall(self.value, self.token_log_probs)
            msg["value"], msg["done"] = self.value, True


class _Left(Exception):
    """A program was left at this site."""

    def __init__(self, site: Any):
        super().__init__()
        self.site = site


class _BeforeText(Messenger):
    """Leaves a program where it would draw its text."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_record(msg) or site_is_subsample(msg):
            return
        if not is_sequence(msg):
            raise ValueError(
                f"site {msg['name']!r} is drawn before the text; SMC grows one text a prompt and knows no other latent site: "
                "use importance() or mcmc(kernel=independence)"
            )
        if inner := [frame.name for frame in msg["cond_indep_stack"] if frame.vectorized and frame.dim != -1]:
            raise ValueError(
                f"site {msg['name']!r} stands in the plate {inner[0]!r}; SMC grows one text a prompt: use importance() or "
                "mcmc(kernel=independence)"
            )
        raise _Left(msg)


class _AtText(Messenger):
    """Leaves a program where this text has its value."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and is_sequence(msg) and not msg["is_observed"]:
            raise _Left(msg)
