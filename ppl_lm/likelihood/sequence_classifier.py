"""Rewards by Hugging Face sequence classifiers: the log probability of a label, or the logit of a reward model."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ppl_lm.likelihood.completions import Completion, text
from ppl_lm.likelihood.reward import preserved_rng, signature_of
from ppl_lm.lm.checking.folders import require_model_folder
from ppl_lm.lm.language_model import default_device, quiet
from ppl_lm.lm.prompts import answered
from ppl_lm.lm.tokens.chats import encode_chat

Rows = list[dict[str, list[int]]]  # of each text what the tokenizer makes of it
ENDLESS = 10**9  # tokens: what a tokenizer says that has no limit
ALIKE = 1e-4  # by how much padding may change a logit, where it is due to rounding


def classifier(
    model: Any,
    label: str | int,
    tokenizer: Any = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Callable[..., list[float]]:
    """Reward: log p(label | completion) in nats by a Hugging Face sequence classifier, 0 at most; `r_max` 0.

    The softmax over labels, or the label's own sigmoid where the classifier is a multi-label one. It sees the completion alone,
    as a text. It is run in eval mode and without gradients, and left in the mode in which it was; no text's score depends on
    the others of its batch. Of a text that is longer than the classifier can read it sees the beginning: a `UserWarning`. An
    empty one of which its tokenizer makes no token is its start token alone, or else its end token.

    :param model: a `PreTrainedModel` for sequence classification, or a folder or hub name of one.
    :param label: its name in the classifier's configuration, or its index.
    :param tokenizer: the classifier's tokenizer; needed when `model` is not a folder or hub name.
    :param batch_size: completions in one forward pass, at most; it is one where padding would change a score, or where
        tokenizer and classifier do not agree on a pad token.
    :param device: of a model that is loaded here; None: CUDA where there is one, as for language models.
    :raises ValueError: if the classifier lacks the label or its own weights; the reward raises it if a text has no tokens.
    """
    scorer = _Scorer(model, tokenizer, batch_size, device)
    labels = scorer.labels
    if len(labels) < 2:
        raise ValueError(f"label={label!r}; the classifier has but one logit, {labels}: it is a reward_model")
    index = label if isinstance(label, int) else _named(label, labels)
    if index not in labels:
        raise ValueError(f"label={label!r}; the classifier has the labels {labels}: give a name or a number of these")
    many = scorer.model.config.problem_type == "multi_label_classification"

    def reward(completions: Iterable[Completion], **_: Any) -> list[float]:
        logits = scorer([text(c) for c in completions])  # (N, labels)
        log_p = torch.nn.functional.logsigmoid(logits) if many else logits.log_softmax(-1)
        return log_p[:, index].tolist()

    reward.__name__ = f"log p({labels[index]})"
    reward.r_max = 0.0  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def reward_model(
    model: Any, tokenizer: Any = None, batch_size: int = 64, device: torch.device | str | None = None
) -> Callable[..., list[float]]:
    """Reward: the logit of a Hugging Face sequence classifier that has but one, in its own unit; no `r_max`.

    Where its tokenizer has a chat template, it sees prompt and completion as that renders them, a prompt that is a string as
    the user's message; what would be longer than it can read is refused. Otherwise it sees the completion alone. As for
    `classifier`: arguments, batches, and texts that are too long.

    :raises ValueError: if the model has several logits, or lacks its own weights; the reward raises it if a template fails.
    """
    scorer = _Scorer(model, tokenizer, batch_size, device)
    if len(scorer.labels) != 1:
        raise ValueError(f"this classifier has the labels {scorer.labels}: its rewards are classifier(model, label)")
    chats = getattr(scorer.tokenizer, "chat_template", None) is not None

    def of_chats(prompts: Sequence[Any], completions: Iterable[Completion], **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return scorer([_chat(prompt, text(completion)) for prompt, completion in pairs])[:, 0].tolist()

    def of_texts(completions: Iterable[Completion], **_: Any) -> list[float]:
        return scorer([text(c) for c in completions])[:, 0].tolist()

    reward = of_chats if chats else of_texts
    reward.__name__ = Path(str(getattr(scorer.model, "name_or_path", ""))).name or type(scorer.model).__name__
    return reward


def by_name(name: str, label: str | None, device: torch.device | str | None = None) -> Callable[..., list[float]]:
    """`classifier` of a folder or hub name, or where it has but one logit `reward_model`.

    :param label: of a classifier: the name or the number of one of its labels; None of a reward model.
    :raises ValueError: if it cannot be loaded or is no trained sequence classifier, or the label does not go with it."""
    model, tokenizer = _load(name, None, device)
    labels = _labels(model)
    if len(labels) == 1:
        if label is not None:
            raise ValueError(f"reward {name!r} has one logit, which is the reward: leave out the label {label!r}")
        return reward_model(model, tokenizer)
    if label is None:
        raise ValueError(f"reward {name!r} is a classifier with the labels {labels}: say which, hf:{name}:LABEL")
    number = int(label) if label not in labels.values() and re.fullmatch(r"[0-9]{1,9}", label) else label
    try:
        return classifier(model, number, tokenizer)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from None


class _Scorer:
    """Texts or chats to logits, (N, labels) float64, in batches of like lengths, padded on the right."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, device: torch.device | str | None):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; give 1 or more")
        if isinstance(model, (str, Path)):
            model, tokenizer = _load(model, tokenizer, device)
        elif tokenizer is None:
            raise ValueError("a classifier that is given as an object needs its tokenizer too: tokenizer=...")
        self.model, self.tokenizer, self.labels = model, tokenizer, _labels(model)
        self.limit, self.reads = _limit(model, tokenizer), {*signature_of(model).parameters}
        ids = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.nothing = [i for i in ids if i is not None][:1]  # stands for a text without tokens
        self.batch_size = batch_size if batch_size > 1 and self._pads() else 1

    def __call__(self, given: list[Any]) -> Float64[Tensor, "N labels"]:
        """:param given: texts, or chats as lists of messages."""
        rows = [self._text(item) if isinstance(item, str) else self._chat(item) for item in given]
        if not all(row["input_ids"] for row in rows):
            raise ValueError(
                "the classifier's tokenizer makes no token of an empty text, and has no start or end token; score it yourself"
            )
        return self._logits(rows, self.batch_size)

    @torch.no_grad()
    def _logits(self, rows: Rows, batch_size: int) -> Float64[Tensor, "N labels"]:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        logits, training = torch.empty(len(rows), len(self.labels), dtype=torch.float64), self.model.training
        self.model.eval()
        try:
            for start in range(0, len(rows), batch_size):
                picks = order[start : start + batch_size]
                logits[picks] = self.model(**self._padded([rows[i] for i in picks])).logits.double().cpu()
        finally:
            self.model.train(training)
        return logits

    def _padded(self, rows: Rows) -> dict[str, Tensor]:
        width = len(rows[0]["input_ids"])  # the longest is first
        pads = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {
            name: torch.tensor(
                [row[name] + [pads.get(name, 0)] * (width - len(row[name])) for row in rows], device=self.model.device
            )
            for name in rows[0]
            if name in self.reads
        }

    def _text(self, given: str) -> dict[str, list[int]]:
        encoded = self.tokenizer(given, truncation=self.limit is not None, max_length=self.limit)
        row = {name: list(encoded[name]) for name in encoded if name in self.tokenizer.model_input_names}
        if not row["input_ids"]:
            row = {name: [0] * len(self.nothing) for name in row} | {"input_ids": self.nothing}
        count = len(row["input_ids"])
        row["attention_mask"] = [1] * count
        if count == self.limit and len(self.tokenizer(given, verbose=False)["input_ids"]) > count:
            warnings.warn(
                f"a text is longer than the {self.limit} tokens that {type(self.model).__name__} can read: it is cut, and the "
                "reward is of what is left. Ask for shorter texts (max_new_tokens), or take another classifier",
                stacklevel=2,
            )
        return row

    def _chat(self, messages: list[Mapping[str, Any]]) -> dict[str, list[int]]:
        ids = encode_chat(self.tokenizer, messages, whole=True)
        if self.limit is not None and len(ids) > self.limit:
            raise ValueError(
                f"a chat has {len(ids)} tokens with its answer; the reward model reads {self.limit}: give shorter prompts, or "
                "a smaller max_new_tokens"
            )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _pads(self) -> bool:
        """Whether texts may be padded to one length: the classifier knows the tokenizer's pad token, and its scores do not
        depend on it, as they do where attention has no mask, or the score is read at the last place."""
        pad = self.tokenizer.pad_token_id
        if pad is None or self.model.config.get_text_config().pad_token_id != pad:
            return False
        rows = sorted(map(self._text, ("good", "good bread and good soup")), key=lambda row: -len(row["input_ids"]))
        if not all(row["input_ids"] for row in rows):
            return False
        alone, together = self._logits(rows, 1), self._logits(rows, 2)
        return bool(((alone - together).abs() <= ALIKE * (1 + alone.abs())).all())


def _labels(model: Any) -> dict[int, str]:
    return {int(i): name for i, name in model.config.id2label.items()}


def _named(label: str, labels: dict[int, str]) -> int | None:
    """Its index, None of a name that no label or several have."""
    found = [i for i, name in labels.items() if name == label]
    return found[0] if len(found) == 1 else None


def _limit(model: Any, tokenizer: Any) -> int | None:
    """Most tokens of a text that the classifier can read; None where nothing limits them."""
    limits = [tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():  # places are counted from after the pad token's where the table has one
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min((limit for limit in limits if limit is not None and 0 < limit < ENDLESS), default=None)


def _chat(prompt: Any, answer: str) -> list[Any]:
    return answered([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "", answer)


def _load(name: str | Path, tokenizer: Any, device: torch.device | str | None) -> tuple[Any, Any]:
    """A sequence classifier in float32 with its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    what = f"reward {str(name)!r}"
    if Path(name).is_dir():
        require_model_folder(Path(name), what)
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):  # as on the hub
        raise ValueError(f"{what}: there is no such folder")
    try:
        with preserved_rng(), quiet():  # what transformers' report of the weights warns of is refused below
            config = AutoConfig.from_pretrained(name)
            if type(config) not in AutoModelForSequenceClassification._model_mapping:
                raise ValueError(f"transformers has no sequence classifier of model type {config.model_type!r}")
            tokenizer = AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers, safetensors and the hub have dozens
        raise ValueError(f"{what} could not be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them at random and only reports it
        raise ValueError(f"{what} is no trained sequence classifier: it lacks {missing[:4]}")
    return model.to(default_device() if device is None else device).eval(), tokenizer
