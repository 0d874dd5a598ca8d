"""Every outcome of a stochastic program's random choices, each with its probability: exact laws without a seed.

A script says which outcome each choice takes. The program runs once for a batch of scripts, a column each; where a script
ends, the first possible outcome is taken and scripts are written for the others.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

Script = tuple[int, ...]
BATCH = 4000  # columns at a time


class Walk:
    """The choices of columns, each a population of SMC: (run, prompt), prompts fastest."""

    def __init__(self, scripts: list[Script]):
        self.scripts = scripts
        self.paths: list[Script] = [() for _ in scripts]
        self.chances = [1.0] * len(scripts)
        self.asked: list[int] | None = None  # all
        self.others: list[list[Script]] = [[] for _ in scripts]

    def pick(self, column: int, chances: list[float]) -> int:
        script, path = self.scripts[column], self.paths[column]
        if len(path) < len(script):
            taken = script[len(path)]
        else:
            taken, *rest = [i for i, chance in enumerate(chances) if chance > 0]
            self.others[column] += [(*path, other) for other in rest]
        self.paths[column] = (*path, taken)
        self.chances[column] *= chances[taken]
        return taken

    def choose(self, log_q, population, many):
        """In the place of `grow.choose`."""
        laws, columns = log_q.double().softmax(-1).tolist(), population.tolist()
        picked = [[self.pick(c, law) for _ in range(many)] for c, law in zip(columns, laws, strict=True)]
        return torch.tensor(picked).reshape(len(columns), many)

    def anywhere(self, count, columns, device):
        """In the place of `smc._anywhere`."""
        return torch.tensor([self.pick(c, [1 / count] * count) for c in range(columns)])

    def needed(self, right):
        """Around `smc._needed`: which columns the rule is about to be asked for."""

        def seen(*args):
            found = right(*args)
            self.asked = found.nonzero()[:, 0].tolist()
            return found

        return seen

    def rule(self, resample):
        """A rule of resampling whose uniform numbers are those of the script: one of each interval in which they all give the
        same."""

        def walked(log_w, count, through=None):
            u = torch.zeros(count + 1, log_w.shape[1], dtype=torch.float64)
            columns = range(log_w.shape[1]) if self.asked is None else self.asked
            for c, column in enumerate(columns):
                planted = None if through is None else int(through[c])
                if bool((log_w[:, c] == -torch.inf).all()):
                    continue
                for row, ends in breakpoints(resample.__name__, log_w[:, c].exp().tolist(), count, planted).items():
                    lengths = [b - a for a, b in itertools.pairwise(ends)]
                    i = self.pick(column, lengths)
                    u[row, c] = (ends[i] + ends[i + 1]) / 2
            return resample(log_w, count, u=u, through=through)

        return walked


def breakpoints(rule: str, w: list[float], count: int, through: int | None) -> dict[int, list[float]]:
    """Where a rule's outcome changes along each of the uniform numbers that it looks at."""
    total = sum(w)
    shares = inclusion(w, count) if rule == "without_replacement" else [count * v / total for v in w]
    line = list(itertools.accumulate(shares))  # of length `count`
    begin, end = (0.0, 1.0) if through is None else (line[through] - shares[through], line[through])

    def cells(points: list[float]) -> list[float]:
        """Points that only rounding tells apart are one, in every batch."""
        made = [0.0]
        for p in sorted(points):
            if made[-1] + 1e-9 < p < 1 - 1e-9:
                made.append(p)
        return [*made, 1.0]

    def along(points: list[float]) -> list[float]:  # of the particle that has to survive
        return cells([(p - begin) / (end - begin) for p in points])

    whole = [float(i) for i in range(count + 1)]
    if rule == "multinomial":
        made = {row: cells([v / count for v in line]) for row in range(1, count + 1)}
        return made if through is None else {0: cells([i / count for i in range(count)]), **made}
    if rule == "stratified":
        made = {row: cells([v - (row - 1) for v in line]) for row in range(1, count + 1)}
        return made if through is None else {0: along(whole), **made}
    rests = [v % 1 for v in line]
    if through is None:
        return {0: cells(rests)}
    return {0: along([*whole, *(i + rest for i in range(count) for rest in rests)])}


def inclusion(w: list[float], count: int) -> list[float]:
    """min(1, c w) that sum to count, c by bisection."""
    if sum(v > 0 for v in w) <= count:
        return [float(v > 0) for v in w]
    low, high = 0.0, count / min(v for v in w if v > 0)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1.0, c * v) for v in w) < count else (low, c)
    return [min(1.0, c * v) for v in w]


def explore(program: Callable[[Walk, int], Any], batch: int = 1) -> list[list[tuple[float, Any]]]:
    """For each of `batch` prompts all (probability, outcome) of a program.

    :param program: (walk, runs) -> outcomes, indexed by [run][prompt]."""
    pending: list[list[Script]] = [[()] for _ in range(batch)]
    found: list[list[tuple[float, Any]]] = [[] for _ in range(batch)]
    while any(pending):
        runs = min(BATCH, max(map(len, pending)))
        now = [[queue.pop() if queue else None for _ in range(runs)] for queue in pending]
        walk = Walk([now[b][r] or () for r in range(runs) for b in range(batch)])
        made = program(walk, runs)
        for r, b in itertools.product(range(runs), range(batch)):
            if now[b][r] is not None:
                found[b].append((walk.chances[r * batch + b], made[r][b]))
                pending[b] += walk.others[r * batch + b]
    for each in found:
        total = sum(chance for chance, _ in each)
        assert abs(total - 1) < 1e-9, total
    return found
