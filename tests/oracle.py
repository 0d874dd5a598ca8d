"""Exact enumeration, written without the package's own scoring: tables are walked prefix by prefix."""

import itertools

import torch
from torch import Tensor


def outcomes(size: int, steps: int, end: int) -> list[tuple[int, ...]]:
    """Finished and truncated completions over `size` tokens, `end` being the only end token; unpadded."""
    letters = [i for i in range(size) if i != end]
    finished = [(*head, end) for n in range(steps) for head in itertools.product(letters, repeat=n)]
    return finished + list(itertools.product(letters, repeat=steps))


def as_tensor(rows: list[tuple[int, ...]], steps: int, pad: int) -> Tensor:
    return torch.tensor([list(row) + [pad] * (steps - len(row)) for row in rows])


def table_row(prefix: tuple[int, ...], size: int) -> int:
    """Prefixes by length, then as numbers in base `size`."""
    number = 0
    for token in prefix:
        number = number * size + token
    return (size ** len(prefix) - 1) // (size - 1) + number


def log_prob(table: Tensor, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """log p(completion | prompt) from a table of logits, float64, differentiable in the table."""
    total, prefix = torch.zeros((), dtype=torch.float64), prompt
    for token in completion:
        logits = table[table_row(prefix, table.shape[1])]
        total = total + logits[token] - torch.logsumexp(logits, 0)
        prefix = (*prefix, token)
    return total


def log_probs(table: Tensor, prompt: tuple[int, ...], rows: list[tuple[int, ...]]) -> Tensor:
    return torch.stack([log_prob(table, prompt, row) for row in rows])


def token_log_probs(table: Tensor, prompt: tuple[int, ...], rows: list[tuple[int, ...]]) -> Tensor:
    """(rows, longest): of each token given those before it, 0 after the last."""
    steps = max(map(len, rows))
    each = [[log_prob(table, (*prompt, *row[:t]), row[t : t + 1]) for t in range(steps)] for row in rows]
    return torch.stack([torch.stack(row) for row in each])


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def condition(table: Tensor, prompt: tuple[int, ...], rows: list[tuple[int, ...]], log_joint: Tensor) -> None:
    """Writes into a table of logits, in place, the law over completions that is proportional to exp(log_joint)."""
    size = table.shape[1]
    with torch.no_grad():
        for head in {row[:n] for row in rows for n in range(len(row))}:
            for token in range(size):
                inside = [j for row, j in zip(rows, log_joint, strict=True) if row[: len(head) + 1] == (*head, token)]
                table[table_row((*prompt, *head), size), token] = torch.stack(inside).logsumexp(0)
