"""One more token for texts begun: from which law it is drawn, and what the intermediate target makes of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ppl_lm.infer.samplers.constraints.allowed_tokens import Allowed, draw_allowed
from ppl_lm.infer.samplers.settings import SMCSettings
from ppl_lm.infer.samplers.twist import Function, PriorPower
from ppl_lm.lm.decoding.decoder import Decoder, invert
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.lm.prompts import Prompts
from ppl_lm.lm.scoring.shared_body import head_on
from ppl_lm.lm.scoring.shortcuts import OtherHeadError
from ppl_lm.lm.scoring.teacher_forcing import normalise
from ppl_lm.lm.token_sequence import TokenSequence
from ppl_lm.lm.vocabulary import Vocabulary

IMPOSSIBLE = (
    "the proposal cannot draw a text that was planted as the posterior's: "
    "its guide or twist finds possible texts impossible"
)


@dataclass(frozen=True)
class Tokens:
    """A next token in M copies of each of n texts; nats, float64.

    :param log_p: log p0(x_t | prompt, x_<t).
    :param log_target: log γ_t(x_≤t) of the text with its new token.
    :param log_increment: log γ_t(x_≤t) / (γ_t-1(x_<t) q(x_t | x_<t)).
    """

    tokens: Int[Tensor, "n M"]
    log_p: Float[Tensor, "n M"]
    log_target: Float[Tensor, "n M"]
    log_increment: Float[Tensor, "n M"]


class Laws:
    """Prior, guide and twist, moved together: a decoder row of each for every text that is still open. A twist around the
    prior's body reads the prior's pass."""

    def __init__(
        self,
        prior: TokenSequence,
        proposal: TokenSequence | None,
        settings: SMCSettings,
        rows: Int[Tensor, "n"],
    ):
        self.vocabulary: Vocabulary = prior.lm.vocabulary
        self.prompts, self.rows, self.settings = prior.prompts, rows, settings
        twist = settings.twist
        self.head = head_on(prior.lm, twist) if isinstance(twist, LanguageModel) else None
        try:
            self.prior = Decoder.of(prior.lm, prior.prompts, rows, () if self.head is None else (self.head,))
        except OtherHeadError:
            self.head, self.prior = None, Decoder.of(prior.lm, prior.prompts, rows)
        self.proposal = None
        if proposal is not None:
            same = proposal.lm is prior.lm and torch.equal(proposal.prompts.ids, prior.prompts.ids)
            self.proposal = self.prior if same else Decoder.of(proposal.lm, proposal.prompts, rows)
        self.network = None
        if isinstance(twist, LanguageModel):
            twist.vocabulary.require_same(self.vocabulary, "twist and target")
            if twist.max_new_tokens != prior.lm.max_new_tokens:
                raise ValueError(
                    f"the twist is for {twist.max_new_tokens} tokens, the model's texts have {prior.lm.max_new_tokens}; give "
                    "both the same max_new_tokens"
                )
            self.network = None if self.head is not None else Decoder.of(twist, prior.prompts, rows)

    def advance(self, rows: Int[Tensor, "m"], tokens: Int[Tensor, "m"]) -> None:
        """Row i goes on from what was row `rows[i]`, by `tokens[i]`."""
        moved = len(rows) != len(self.rows) or not torch.equal(rows, torch.arange(len(rows), device=rows.device))
        self.rows = self.rows[rows]
        for decoder in dict.fromkeys((self.prior, self.proposal, self.network)):  # a proposal may be the prior
            if decoder is not None:
                if moved:
                    decoder.reorder(rows)
                decoder.advance(tokens)

    def log_psi(self) -> Float[Tensor, "n V"] | None:
        """log ψ of each text with every next token, where the twist is a network."""
        if self.head is not None:
            return self.prior.read(self.head)
        return None if self.network is None else self.network.logits()

    def propose(
        self,
        x: Int[Tensor, "n T"],
        t: int,
        log_target: Float[Tensor, "n"],
        log_p0: Float[Tensor, "n"],
        population: Int[Tensor, "n"],
        many: int = 1,
        forced: Int[Tensor, "n M"] | None = None,
    ) -> Tokens:
        """Draws `many` next tokens for each text, at position t.

        :param log_target: log γ_t-1 of the texts so far; `log_p0` their log p0.
        :param population: that each belongs to.
        :param forced: what the next tokens have to be, where it is not -1."""
        twist, due = self.settings.twist, self.settings.after(t + 1)
        log_p = self.prior.log_probs()  # (n, V)
        log_psi = self.log_psi()
        log_q = self._proposal(log_p, log_psi, x, t, due)
        log_allowed = torch.zeros(
            (), dtype=torch.float64, device=log_q.device
        )  # of which estimate the tokens come with
        if self.settings.checker is None:
            tokens = choose(log_q, population, many)  # (n, M)
        else:
            one = draw_allowed(log_q, self._allowed(x, t), lambda law, rows: choose(law, population[rows], 1)[:, 0])
            tokens, log_allowed = (v.unsqueeze(-1) for v in one)
        if forced is not None:
            tokens = torch.where(forced >= 0, forced, tokens)
        lp, lq = log_p.gather(-1, tokens).double(), log_q.gather(-1, tokens).double()
        before, prefix = log_target.unsqueeze(-1), log_p0.unsqueeze(-1)
        if bool(((lq == -torch.inf) & (lp > -torch.inf)).any()):
            raise ValueError(IMPOSSIBLE)
        if twist is None:  # the guide's own law, or the prior's, is the intermediate target
            return Tokens(tokens, lp, before + lq, torch.zeros_like(lq) + log_allowed)
        if log_psi is not None:
            psi = log_psi.gather(-1, tokens).double()
        elif isinstance(twist, PriorPower):
            psi = twist.log_psi(prefix + lp)
        else:
            psi = torch.where(before == -torch.inf, -torch.inf, before - prefix).expand_as(lp)  # as it was
            asked = torch.ones_like(tokens, dtype=torch.bool)
            if not due and t + 1 < x.shape[-1]:
                asked = self.vocabulary.is_end(tokens)
            psi = psi.masked_scatter(asked, self._log_psi(x, t, tokens, asked))
        after = prefix + lp + psi
        after = torch.where((lp == -torch.inf) | (psi == -torch.inf), -torch.inf, after)
        increment = torch.where((before == -torch.inf) | (after == -torch.inf), -torch.inf, after - before - lq)
        return Tokens(tokens, lp, after, increment + log_allowed)

    def _proposal(
        self,
        log_p: Float[Tensor, "n V"],
        log_psi: Float[Tensor, "n V"] | None,
        x: Int[Tensor, "n T"],
        t: int,
        due: bool,
    ) -> Float[Tensor, "n V"]:
        """log q of every next token.

        :param due: whether a twist that is a function is asked of open texts now."""
        twist, candidates = self.settings.twist, self.settings.candidates
        if self.proposal is not None:
            return self.proposal.log_probs()
        if isinstance(twist, PriorPower):
            return normalise(twist.alpha * log_p)
        if candidates is not None and (due or log_psi is not None):
            likeliest = log_p.topk(min(candidates, log_p.shape[-1])).indices  # (n, c)
            if log_psi is None:
                psi = self._log_psi(x, t, likeliest, torch.ones_like(likeliest, dtype=torch.bool)).reshape(
                    likeliest.shape
                )
            else:
                psi = log_psi.gather(-1, likeliest)
            return _tilted_among(log_p, likeliest, psi.to(log_p.dtype))
        return log_p if log_psi is None else _tilted(log_p, log_p + log_psi)

    def _log_psi(
        self, x: Int[Tensor, "n T"], t: int, tokens: Int[Tensor, "n M"], asked: Bool[Tensor, "n M"]
    ) -> Float64[Tensor, "m"]:
        """log ψ_t of each text with those of its tokens that are asked about, by a twist that is a function."""
        row = asked.nonzero()[:, 0]
        grown = x[row]
        grown[:, t] = tokens[asked]
        assert callable(self.settings.twist)
        return ask(self.settings.twist, self.prompts.take(self.rows[row]), grown, torch.full_like(row, t + 1))

    def _allowed(self, x: Int[Tensor, "n T"], t: int) -> Allowed:
        """Which tokens the checker lets some of these texts go on with at position t."""

        def allowed(rows: Int[Tensor, "m"], tokens: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
            grown = x[rows]
            grown[:, t] = tokens
            assert self.settings.checker is not None
            return self.settings.checker.allows(
                self.prompts.take(self.rows[rows]), grown, torch.full_like(tokens, t + 1)
            )

        return allowed


def ask(twist: Function, prompts: Prompts, x: Int[Tensor, "m T"], n: Int[Tensor, "m"]) -> Float64[Tensor, "m"]:
    """log ψ_n of texts of which n tokens are known, padding after them, by a twist that is a function.

    :raises ValueError: unless it answers one number for each text, finite or -inf."""
    if not len(x):
        return torch.zeros(0, dtype=torch.float64, device=x.device)
    vocabulary, x = prompts.vocabulary, x.clone()
    open_ = (~vocabulary.is_end(x.gather(-1, n.unsqueeze(-1) - 1)[:, 0]) & (n < x.shape[-1])).nonzero()[:, 0]
    x[open_, n[open_]] = vocabulary.end_ids[0]  # as if they ended here
    answer = twist(prompts, x, n)
    if answer.shape != (len(x),) or bool(answer.isnan().any()) or bool((answer == torch.inf).any()):
        raise ValueError(
            f"the twist answered shape {tuple(answer.shape)} for {len(x)} texts, {int(answer.isnan().sum())} of "
            f"them NaN and {int((answer == torch.inf).sum())} infinite; it needs one log ψ for each, finite or -inf"
        )
    return answer.double()


def choose(log_q: Float[Tensor, "n V"], population: Int[Tensor, "n"], many: int) -> Int[Tensor, "n M"]:
    """`many` tokens of each row's law. One random number each, from torch's global generator."""
    u = torch.rand(len(log_q), many, dtype=torch.float64, device=log_q.device)
    return torch.stack([invert(log_q, u[:, m]) for m in range(many)], 1)


def _tilted(log_p: Float[Tensor, "n V"], log_gamma: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """The law in proportion to exp(log_gamma); where nothing is possible, the prior's: those texts have weight zero."""
    lost = (log_gamma == -torch.inf).all(-1, keepdim=True)
    return torch.where(lost, log_p, normalise(log_gamma)) if bool(lost.any()) else normalise(log_gamma)


def _tilted_among(
    log_p: Float[Tensor, "n V"], candidates: Int[Tensor, "n M"], log_psi: Float[Tensor, "n M"]
) -> Float[Tensor, "n V"]:
    """q ∝ p0 ψ over the candidates, and p0 times their mean ψ over the others."""
    known = log_p.gather(-1, candidates)
    mean = (known + log_psi).logsumexp(-1, keepdim=True) - known.logsumexp(-1, keepdim=True)
    mean = torch.where(mean == -torch.inf, 0.0, mean)  # none of them is possible: the others are all that is left
    return _tilted(log_p, (log_p + mean).scatter(-1, candidates, known + log_psi))
