"""Where a step's texts come from if not from the guide as it is: another program, the step before, or a memory."""

import copy
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ppl_lm.infer.terms import Terms
from ppl_lm.infer.traces.sources import ProposalTrace


class Proposal:
    """Texts from a program of their own, q in DPG's papers, with importance ratios.

    :param program: with the guide's latent sites: `bind(ppl_lm.guides.prior, lm)`, or a copy of the guide.
    :param every: steps after which a copy of the program takes over the guide's weights if in these steps KL(p ‖ guide) was
        below KL(p ‖ program) by more than two standard errors: the rule of KL-adaptive DPG (Khalifa et al. 2021), made to
        wait for evidence. The program must be made like the guide then: see `like`. None: never.
    """

    updates = 1

    def __init__(self, program: nn.Module, every: int | None = None):
        if not isinstance(program, nn.Module):
            raise ValueError(f"program={program!r}; give a bound program, ppl_lm.bind(...)")
        if every is not None and every < 2:
            raise ValueError(f"every={every}; give at least 2 steps, or None")
        self.program, self.every = program if every is None else copy.deepcopy(program), every
        self.taken_over = 0
        self.gaps: list[float] = []

    @classmethod
    def like(cls, guide: nn.Module, every: int | None = 10) -> "Proposal":
        """Starts as a copy of the guide as it is."""
        return cls(copy.deepcopy(guide), every)

    @torch.no_grad()
    def __call__(self, draw: Callable[..., ProposalTrace], prompts: Any) -> ProposalTrace:
        return draw(self.program)

    def update(self, terms: Terms, guide: Any) -> None:
        """The mean of w/Ẑ (log q - log b) estimates KL(p ‖ program) - KL(p ‖ guide), w = p(x, evidence)/b(x). Ẑ is the
        step's estimate of Z, not its own particles' mean, which with few particles hides what they miss."""
        assert terms.log_proposal is not None
        if self.every is None:
            return
        mine, theirs = guide.state_dict(), self.program.state_dict()
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
            raise ValueError(
                "every= needs a program made like the guide, whose weights it can take: Proposal.like(guide)"
            )
        log_share = terms.log_joint - terms.log_proposal - terms.log_z
        gap = log_share.exp() * (terms.log_guide - terms.log_proposal)
        self.gaps.append(float(torch.where(log_share.isfinite(), gap, 0.0).mean()))  # 0: impossible, or Z unknown
        if len(self.gaps) < self.every:
            return
        gaps, self.gaps = torch.tensor(self.gaps), []
        if float(gaps.mean()) > 2 * float(gaps.std()) / math.sqrt(len(gaps)):
            self.program.load_state_dict(mine)
            self.taken_over += 1


class Reuse:
    """Each batch of texts serves several updates, by importance ratios after the first.

    :param updates: of one batch; new texts are drawn before that where the prompts change."""

    def __init__(self, updates: int):
        if not isinstance(updates, int) or updates < 1:
            raise ValueError(f"updates={updates}; give a whole number, at least 1")
        self.updates, self.left = updates, 0
        self.prompts: Any = None  # of the texts that are kept
        self.texts: ProposalTrace | None = None

    def __call__(self, draw: Callable[..., ProposalTrace], prompts: Any) -> ProposalTrace:
        identities = prompts.identities() if hasattr(prompts, "identities") else prompts
        if self.texts is None or self.left < 1 or self.prompts != identities:
            self.prompts, self.texts, self.left = identities, draw(), self.updates
        else:
            self.texts = replace(self.texts, repeated=True)
        self.left -= 1
        return self.texts

    def update(self, terms: Terms, guide: Any) -> None:
        pass


@dataclass
class Replay:
    """Some texts are the most probable ones that were ever drawn for the prompt, the others new: for objectives that need no
    importance ratios (trajectory_balance, vargrad, subtb), and programs with one text.

    :param capacity: texts kept for each prompt, those of the largest p(x, evidence).
    :param share: of the particles that are replayed once there are enough, between 0 and 1."""

    capacity: int = 256
    share: float = 0.25
    kept: dict[tuple[Any, ...], dict[tuple[int, ...], float]] = field(default_factory=dict, repr=False)
    updates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.capacity, int) or self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}; give at least 1 text")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}; give a number between 0 and 1")

    def __call__(self, draw: Callable[..., ProposalTrace], prompts: Any) -> ProposalTrace:
        proposed = draw()
        texts = proposed.texts()
        if len(texts) != 1:
            raise ValueError(f"Replay remembers one text for each prompt; this guide draws {len(texts)}")
        ((name, text),) = texts.items()
        self.x = text.value.clone()  # (K, B, T)
        count = min(self.capacity, round(self.share * len(self.x)), len(self.x) - 1)
        if count < 1:
            raise ValueError(
                f"share={self.share} of {len(self.x)} particles is none: give more particles or a larger share"
            )
        from_guide = torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        for b, key in enumerate(self._keys(text.law.prompts)):
            known = list(self.kept.get(key, ()))
            if len(known) >= count:
                picks = torch.randperm(len(known))[:count].tolist()
                self.x[:count, b] = self.x.new_tensor([known[i] for i in picks])
                from_guide[:count, b] = False
        return proposed.with_text(name, self.x, from_guide)

    def _keys(self, prompts: Any) -> list[tuple[Any, ...]]:
        return [(*key, self.x.shape[-1]) for key in prompts.identities()]

    def update(self, terms: Terms, guide: Any) -> None:
        for b, key in enumerate(self._keys(terms.prompts)):
            new = dict(zip(map(tuple, self.x[:, b].tolist()), terms.log_joint[:, b].tolist(), strict=True))
            known = {**self.kept.get(key, {}), **new}
            self.kept[key] = dict(heapq.nlargest(self.capacity, known.items(), key=lambda item: item[1]))
