"""How varied texts are: shares of different n-grams and texts, BLEU among themselves, and what their tokens do."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_lm.criticism.averages import over_prompts
from ppl_lm.criticism.expectations import expectation
from ppl_lm.infer.draws import Draws
from ppl_lm.lm.prompts import Prompts

ORDERS = (1, 2, 3)
MOST = 100  # texts for self-BLEU, which grows with their number


def diversity(draws: Draws, name: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Figures averaged over prompts, and under `prompts` the same of each prompt.

    They are those of the law that drew the texts, as they come: of a guide for `importance`, of the posterior for exact draws
    and Markov chains. Weights are never used; for a weighted posterior take texts by `draws.reweighted()` first.

    `distinct_1`, `distinct_2`, `distinct_3`: different n-grams / all n-grams, over all texts of a prompt (Li et al. 2016), of
    *tokens*, end tokens left out. They fall with the number of texts, so compare equal numbers. `unique`: the share of draws
    that are different texts, likewise. `self_bleu`, 0 to 100: the mean sentence BLEU of each text, with all others as
    references (Zhu et al. 2018; sacrebleu, up to the order that the text has), of at most 100 texts; an empty text scores 100
    where another is empty too. It has no standard error, since the scores share their references.

    `truncated`: the share of texts without an end token. `not_roundtrip`: the share whose tokens do not survive decode →
    encode, neither alone nor after their prompt: such a text is a second spelling of one that has other tokens. `entropy`:
    -E[log q], nats, of all latent sites. Each of these is a mean with its standard error (`_se`): of chains ArviZ's, of draws
    that came about together from the spread of the runs.

    None where it does not apply: `distinct_n` if no text has n tokens; `self_bleu` without sacrebleu (the extra `metrics`), or
    of fewer than two texts; `self_bleu` and `not_roundtrip` of a vocabulary without a tokenizer; `entropy` of draws that do
    not have the guide's law (exact ones, chains, runs) or no weights of their own for each prompt; standard errors of one
    draw or run.

    :param name: of the site that is text; None: `x`, or the first.
    :param seed: of the choice of texts for self-BLEU; torch's random state is neither used nor changed.
    :raises ValueError: if no site of this name is text, or log q of a draw is NaN.
    """
    if not draws.texts or (name is not None and name not in draws.texts):
        raise ValueError(f"name={name!r}, but the sites that are text are {list(draws.texts)}")
    name = name or draws.text_site
    if bool(draws.log_guide.isnan().any()):
        raise ValueError("log_guide is NaN for some draws; give draws as a sampler made them")
    draws = draws.map(lambda v: v.cpu())
    x = draws[name]  # (C, S, B, *inner, T)
    by_prompt = [_figures(x[:, :, b], draws, b, seed) for b in range(x.shape[2])]
    average = over_prompts(by_prompt, shared=("num_samples",), without=("prompt",))
    return {**average, "prompts": by_prompt}


def distinct(rows: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams / all n-grams of the rows together; None if there are none.

    >>> distinct([[1, 2, 1], [1, 2]], 1), distinct([[1, 2, 1], [1, 2]], 2), distinct([[1]], 2)
    (0.4, 0.6666666666666666, None)
    """
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: list[str], seed: int = 0) -> float | None:
    """Mean BLEU of each text against all others, 0 to 100, of at most 100 of them chosen at random; None without sacrebleu or a
    second text."""
    try:
        from sacrebleu.metrics.bleu import BLEU  # pyright: ignore[reportMissingImports]
        from sacrebleu.metrics.helpers import extract_all_word_ngrams  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    if len(texts) < 2:
        return None
    if len(texts) > MOST:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        texts = [texts[i] for i in order[:MOST].tolist()]
    bleu, empty = BLEU(effective_order=True), sum(not text.strip() for text in texts)
    orders = range(1, bleu.max_ngram_order + 1)
    counted = [extract_all_word_ngrams(bleu.tokenizer(text.rstrip()), orders[0], orders[-1]) for text in texts]
    most: dict[tuple[str, ...], list[int]] = {}  # the two largest counts of each n-gram in one text
    for grams, _ in counted:
        for gram, count in grams.items():
            most[gram] = sorted([*most.get(gram, (0, 0)), count])[1:]
    scores = []
    for i, (text, (grams, length)) in enumerate(zip(texts, counted, strict=True)):
        if not text.strip():  # to sacrebleu no n-gram is no match, so that empty texts would look varied
            scores.append(100.0 if empty > 1 else 0.0)
            continue
        correct, total = [0] * len(orders), [0] * len(orders)
        for gram, count in grams.items():
            second, first = most[gram]
            total[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, second if count == first else first)  # what another text has
        others = (n for j, (_, n) in enumerate(counted) if j != i)
        closest = min(others, key=lambda n: (abs(n - length), n))
        scores.append(bleu.compute_bleu(correct, total, length, closest, "exp", effective_order=True).score)
    return sum(scores) / len(scores)


def survives(ids: Sequence[int], prompts: Prompts, b: int = 0) -> bool:
    """Whether the tokens of a completion of prompt b, without its end token, are what the tokenizer makes of their text:
    alone, or after the prompt (some tokenizers write the first word of a text in another way)."""
    vocabulary = prompts.vocabulary

    def again(rows: Sequence[int]) -> list[int]:
        return vocabulary.plain(vocabulary.texts([rows])[0])

    if not ids or again(ids) == list(ids):
        return True
    return again([*prompts.unpadded()[b], *ids])[-len(ids) :] == list(ids)


def _figures(x: Int[Tensor, "C S ..."], draws: Draws, b: int, seed: int) -> dict[str, Any]:
    """Of the texts of one prompt."""
    vocabulary = draws.prompts.vocabulary
    flat = x.reshape(-1, x.shape[-1])  # (N, T)
    ended = vocabulary.is_end(flat).any(-1)
    rows = [row[:-1] if end else row for row, end in zip(vocabulary.completion_ids(flat), ended.tolist(), strict=True)]
    figures: dict[str, Any] = {"prompt": draws.prompts.texts[b], "num_samples": draws.num_samples}
    figures |= {f"distinct_{n}": distinct(rows, n) for n in ORDERS}
    has_text = vocabulary.tokenizer is not None
    figures["self_bleu"] = self_bleu(draws.prompts[b : b + 1].decode(flat), seed) if has_text else None
    whole = x.flatten(0, 1).flatten(1)  # (S, tokens)
    figures["unique"] = len(whole.unique(dim=0)) / len(whole)

    def share(of_rows: Tensor) -> Tensor:  # (N,) -> (C, S, 1)
        return of_rows.double().reshape(*x.shape[:2], -1).mean(-1, keepdim=True)

    figures["truncated"], figures["truncated_se"] = _mean(share(~ended), draws)
    lost = None
    if has_text:
        known = {ids: not survives(ids, draws.prompts, b) for ids in set(map(tuple, rows))}
        lost = share(torch.tensor([known[tuple(row)] for row in rows]))
    figures["not_roundtrip"], figures["not_roundtrip_se"] = (None, None) if lost is None else _mean(lost, draws)
    own = draws.is_local and draws.kind == "weighted"  # only then is log q their law
    entropy = _mean(-draws.log_guide[..., b : b + 1], draws) if own else (None, None)
    figures["entropy"], figures["entropy_se"] = entropy
    return figures


def _mean(value: Float[Tensor, "C S 1"], draws: Draws) -> tuple[float, float | None]:
    """Of draws as they come; no error where there is none."""
    equal = torch.full(value.shape, 1 / value[..., 0].numel(), dtype=torch.float64)
    mean, se = expectation(draws, value, equal).item()
    return mean, se if math.isfinite(se) else None
