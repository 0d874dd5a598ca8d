"""The one text site of a program: its law without a draw from it, and a value put in its place."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_lm.infer.traces.sites import is_record, is_sequence
from ppl_lm.lm.token_sequence import TokenSequence


class Resumed(Messenger):
    """The guide's text site draws `value` anew from `start` on, instead of all of it."""

    def __init__(self, name: str, value: Int[Tensor, "N B T"], start: Int[Tensor, "N B"]):
        super().__init__()
        self.name, self.value, self.start = name, value, start

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not msg["done"]:
            msg["value"], msg["done"] = msg["fn"].resume(self.value, self.start), True


def text_law(program: Callable[..., Any], prompts: Any) -> TokenSequence:
    """The distribution from which a program draws its text, batch shape (B,), found by running the program up to there.

    :raises ValueError: if it draws something else first, or no text."""
    try:
        with _Stop():
            program(prompts)
    except _Found as found:
        return found.law
    raise ValueError("this program draws no text; SMC grows one text a prompt")


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


class _Found(Exception):
    def __init__(self, law: TokenSequence):
        super().__init__()
        self.law = law


class _Stop(Messenger):
    """Leaves a program where it would draw its text."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_record(msg) or site_is_subsample(msg):
            return
        if not is_sequence(msg):
            raise ValueError(
                f"site {msg['name']!r} is drawn before the text; SMC grows one text a prompt and knows no other latent site: "
                "use importance() or mcmc(kernel=independence)"
            )
        raise _Found(msg["fn"])
