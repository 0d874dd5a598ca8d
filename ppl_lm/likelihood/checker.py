"""`Checker`: hard structure that a function can see in a text, and in the beginning of one."""

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from ppl_lm.likelihood.reward import Reward, preserved_rng
from ppl_lm.likelihood.reward_values import RewardError, short
from ppl_lm.lm import meter
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.tokens.chats import special_tokens
from ppl_lm.lm.tokens.token_pieces import HALF, added


class Checker(Reward):
    """A set of whole texts, told by a function: a parser, a schema, a compiler, whatever can look at a text.

    As evidence it is a constraint, `bind(constrained, prior, constraint=checker)`; `adaptive_rejection` and `smc` with
    `SMCSettings(checker=...)` ask it while texts grow. Its law is that of an `Automaton` for the same texts. A text that holds
    a control token is not one of them.

    :param function: `function(text, whole)`. Of a whole text it says whether that is in the set: True or False. Of the
        beginning of one (`whole` is False) it says False where no text that begins so is in the set, and anything else where
        one may be: True, or None for "not yet known". What it rules out early is not written on; what it rules out wrongly
        would change the law, and is refused where it is seen. A function of the text alone is asked of whole texts only. The
        text is what the completion adds to its prompt's.
    :param cut_off: whether a text that `max_new_tokens` cut off counts as whole. If not it is never in the set, as with
        an `Automaton`.

    >>> checker = Checker(lambda text, whole: len(text) <= 40 and (not whole or text.endswith(".")))
    """

    def __init__(self, function: Callable[..., bool | None], cut_off: bool = False):
        if not callable(function):
            raise TypeError(f"a checker is a function of a text, and of whether it is whole; got {function!r}")
        self.reads_beginnings, self.cut_off = _takes_two(function), cut_off
        super().__init__(function, r_max=1.0)

    @classmethod
    def regex(cls, pattern: str, cut_off: bool = False) -> "Checker":
        """The texts that match a regular expression as a whole; it tells of a beginning, too, whether one may follow from it.

        :raises ValueError: if the pattern cannot be read."""
        import regex  # transformers brings it; of Python's own `re` one cannot ask for part of a match

        try:
            compiled = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"pattern={pattern!r} cannot be read: {error}") from error

        def matches(text: str, whole: bool) -> bool:
            return compiled.fullmatch(text, partial=not whole) is not None

        return cls(matches, cut_off)

    def __repr__(self) -> str:
        return f"Checker({self.name}, cut_off={self.cut_off})"

    def _scored(self, prompts: Prompts, x: Int[Tensor, "*#S T"], shape: torch.Size) -> Float64[Tensor, "*S"]:
        """1 for each whole completion that is in the set, else 0."""
        n = prod(shape)
        rows = torch.arange(prod(prompts.batch_shape)).reshape(prompts.batch_shape).expand(shape).reshape(n)
        ids = x.detach().expand(*shape, x.shape[-1]).reshape(n, x.shape[-1])
        flat = prompts.flatten().take(rows.to(prompts.ids.device))
        return self.allows(flat, ids, prompts.vocabulary.lengths(ids)).double().reshape(shape)

    def allows(self, prompts: Prompts, x: Int[Tensor, "N T"], n: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Whether a text in the set may begin with the first n tokens of each completion; of one that is whole by then
        whether it is in the set.

        :param prompts: one for each text; n: at least 1, and no more than the text has, its end token included."""
        vocabulary, steps = prompts.vocabulary, x.shape[-1]
        position = torch.arange(steps, device=x.device)
        ended = vocabulary.is_end(x).logical_and(position < n.unsqueeze(-1)).any(-1)
        whole = ended | (n == steps)
        control = set(special_tokens(vocabulary.tokenizer)) - set(vocabulary.end_ids)
        ids = [row[:length] for row, length in zip(x.tolist(), n.tolist(), strict=True)]
        clean = torch.tensor([control.isdisjoint(row) for row in ids], device=x.device)
        possible = clean & (ended | ~whole | self.cut_off)
        rows = possible.nonzero()[:, 0]
        if len(rows):
            written = added(vocabulary, prompts.take(rows).contexts, [ids[i] for i in rows.tolist()])
            answers = self._answers([text for _, text in written], whole[rows].tolist())
            possible[rows] = answers.to(x.device)
        return possible

    def _answers(self, texts: Sequence[str], whole: Sequence[bool]) -> Bool[Tensor, "N"]:
        """What the function says of each text, each question once."""
        asked = [(text if done else text.rstrip(HALF), done) for text, done in zip(texts, whole, strict=True)]
        with preserved_rng():
            answers = {question: self._ask(*question) for question in dict.fromkeys(asked)}
        return torch.tensor([answers[question] for question in asked])

    def _ask(self, text: str, whole: bool) -> bool:
        if not whole and not self.reads_beginnings:
            return True
        meter.add(checker_calls=1)
        what = f"the {'whole' if whole else 'begun'} text {short(text)}"
        try:
            answer: Any = self.function(text, whole) if self.reads_beginnings else self.function(text)
        except Exception as error:
            raise RewardError(f"checker {self.name!r} raised {type(error).__name__}: {error}; of {what}") from error
        if not whole and answer is None:
            return True
        if not (isinstance(answer, (bool, int, float, np.bool_)) and answer in (0, 1)):
            raise RewardError(
                f"checker {self.name!r} answered {short(answer)} of {what}; it has to say True or False"
                f"{'' if whole else ', or None where that is not known yet'}"
            )
        return bool(answer)


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether it takes a second argument by position: whether the text is whole.

    :raises TypeError: if it takes none, or cannot do with two."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # of a built-in
        return False
    for arguments in (("", True), ("",)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 2 and not _is_optional(signature)
    raise TypeError(f"a checker is called as function(text, whole) or function(text); this one takes {signature}")


def _is_optional(signature: inspect.Signature) -> bool:
    """Whether a second parameter is there for something else: one with a default, of another name than `whole`."""
    second = list(signature.parameters.values())[1:2]
    return bool(second) and second[0].default is not inspect.Parameter.empty and second[0].name != "whole"
