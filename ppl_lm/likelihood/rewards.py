"""Ready rewards: functions in TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float]`.

One that has a bound carries it as the attribute `r_max`.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ppl_lm.likelihood.completions import Completion, text
from ppl_lm.likelihood.sequence_classifier import classifier, reward_model

__all__ = ["classifier", "contains", "length", "reward_model", "text", "vader"]


def vader(completions: Sequence[Completion], **_: Any) -> list[float]:
    """Sentiment: VADER's `compound` of the completion, from -1 (worst) to 1 (best), 0 for neutral; `r_max` 1.

    Hutto and Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text."""
    return [float(_vader_analyzer().polarity_scores(text(c))["compound"]) for c in completions]


vader.r_max = 1.0  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _vader_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # reads its lexicon: 50 ms

    return SentimentIntensityAnalyzer()


def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Tokens in the completion, its end token included: 0 and up; no `r_max`."""
    return [float(len(ids)) for ids in completion_ids]


def contains(word: str) -> Callable[..., list[float]]:
    """Reward: 1 if the completion has `word` as a whole word, in upper or lower case, else 0; `r_max` 1.

    >>> contains("soup")(completions=["Soup!", "soups"])
    [1.0, 0.0]
    """
    if not word.strip():
        raise ValueError(f"contains: the word is {word!r}; give one that has a letter")
    pattern = re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)

    def reward(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(pattern.search(text(c)) is not None) for c in completions]

    reward.__name__ = f"contains:{word.strip()}"
    reward.r_max = 1.0  # pyright: ignore[reportFunctionMemberAccess]
    return reward
