"""Ready rewards: functions in TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float]`.

One that has a bound carries it as the attribute `r_max`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ppl_lm.likelihood.reward import preserved_rng

Completion = str | Sequence[Mapping[str, Any]]  # plain text, or the assistant's messages


def text(completion: Completion) -> str:
    """The text of a completion, plain or chat.

    >>> text([{"role": "assistant", "content": "Good soup."}])
    'Good soup.'
    """
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


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


def classifier(model: Any, label: str | int, tokenizer: Any = None, batch_size: int = 64) -> Callable[..., list[float]]:
    """Reward: log p(label | completion) in nats by a Hugging Face sequence classifier, 0 at most; `r_max` 0.

    The softmax over labels, or the label's own sigmoid where the classifier is a multi-label one. It is run in eval
    mode and without gradients, and left in the mode in which it was. Texts longer than it can read are cut at the end.

    :param model: a `PreTrainedModel` for sequence classification, or a folder or hub name of one.
    :param label: its name in the classifier's configuration, or its index.
    :param tokenizer: the classifier's tokenizer; needed when `model` is not a folder or hub name.
    :param batch_size: completions in one forward pass.
    :raises ValueError: if the classifier lacks the label or its own weights, or the tokenizer cannot pad; the reward
        raises it if a text has no tokens at all, which only tokenizers without a start token make of an empty one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give 1 or more")
    if isinstance(model, (str, Path)):
        model, tokenizer = _load_classifier(model, tokenizer)
    elif tokenizer is None:
        raise ValueError("a classifier that is given as an object needs its tokenizer too: tokenizer=...")
    if batch_size > 1 and tokenizer.pad_token is None:
        raise ValueError("the classifier's tokenizer has no pad token; set one, or use batch_size=1")
    names = {int(i): name for i, name in model.config.id2label.items()}
    index = label if isinstance(label, int) else {name: i for i, name in names.items()}.get(label)
    if len(names) < 2 or index not in names:
        raise ValueError(f"label={label!r}; the classifier has the labels {names}, and needs two or more")
    many = model.config.problem_type == "multi_label_classification"
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    max_length = min(limit for limit in limits if limit is not None)

    def scores(texts: list[str]) -> list[float]:
        batch = tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=max_length, return_tensors="pt")
        if not batch["attention_mask"].any(-1).all():
            raise ValueError("the classifier's tokenizer makes no token of an empty text; score that case yourself")
        logits = model(**batch.to(model.device)).logits.double()  # (N, labels)
        log_p = torch.nn.functional.logsigmoid(logits) if many else logits.log_softmax(-1)
        return log_p[:, index].tolist()

    def reward(completions: Iterable[Completion], **_: Any) -> list[float]:
        texts, training = [text(c) for c in completions], model.training
        model.eval()
        try:
            with torch.no_grad():
                return [r for i in range(0, len(texts), batch_size) for r in scores(texts[i : i + batch_size])]
        finally:
            model.train(training)

    reward.__name__ = f"log p({names[index]})"
    reward.r_max = 0.0  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def _load_classifier(name: str | Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with preserved_rng():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"]:  # transformers fills them at random and only reports it
        raise ValueError(f"{name} is no trained sequence classifier: it lacks {sorted(info['missing_keys'])}")
    return model, AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
