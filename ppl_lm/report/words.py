"""The figures of `diagnosis.json` in words: key -> name, unit, meaning."""

DISTANCES = {
    "kl_q_p": ("KL(guide ‖ posterior)", "nats", "what a user of the guide's draws gets wrong: log Z − ELBO"),
    "kl_p_q": ("KL(posterior ‖ guide)", "nats", "what the guide fails to cover: EUBO − log Z"),
    "kl_prior_p": ("KL(prior ‖ posterior)", "nats", "where it began"),
    "kl_p_prior": ("KL(posterior ‖ prior)", "nats", "what the evidence says beyond the prior"),
    "kl_q_prior": ("KL(guide ‖ prior)", "nats", "how far the guide has moved"),
    "missing": (
        "posterior mass missed",
        "%",
        "in texts that the guide draws less than a hundredth as often as it should",
    ),
    "entropy": ("entropy of the guide", "nats", "of a whole draw"),
    "entropy_posterior": ("entropy of the posterior", "nats", "of a whole draw; a collapsed guide has much less"),
}
BRACKET = {
    "elbo": ("ELBO", "nats", "lower bound of log Z from the guide's draws"),
    "iwae": ("IWAE", "nats", "the same from the mean of up to 64 weights: a tighter one"),
    "log_z": ("log Z", "nats", "the log evidence: of the prior times the likelihood"),
    "iwae_upper": ("reverse IWAE", "nats", "upper bound from the mean of weights, a posterior draw's among them"),
    "upper": (
        "EUBO",
        "nats",
        "upper bound of log Z: E[log w] of the posterior, by the draws of the prior and of the guide together",
    ),
    "elbo_gain": ("ELBO(guide) − ELBO(prior)", "nats", "how much closer the guide is than the prior was"),
}
REWARDS = {
    "reward_prior": ("E[reward] of the prior", "", "in the reward's own unit"),
    "reward": ("E[reward] of the guide", "", ""),
    "reward_posterior": ("E[reward] of the posterior", "", "what was asked for: more is not better"),
}
WEIGHTS = {
    "ess": ("effective sample size", "draws", "how many exact draws the guide's weighted draws are worth"),
    "khat": ("k-hat", "", "shape of the weights' tail; above the threshold no average by weights can be trusted"),
    "max_weight": ("largest weight", "%", "of the sum of all: a fact about these draws, without an error"),
    "possible": ("possible draws", "%", "of the guide's: those that the evidence does not rule out"),
    "seen": ("posterior seen by the prior", "draws", "how many posterior draws the prior's are worth"),
    "exact_draws": ("exact draws", "draws", "of the posterior, behind the reverse IWAE"),
    "num_samples": ("draws", "draws", "of the prior and of the guide each, for every prompt"),
}
DRAWS_FIGURES = {  # of a sampler's draws
    "reward": ("E[reward] of the posterior", "", "by these draws, in the reward's own unit"),
    "length": ("E[length] of the posterior", "tokens", "the end token included"),
    "log_prior": ("E[log p0] of the posterior", "nats", "how probable the prior finds its texts"),
    "log_z": ("log Z", "nats", "the log evidence: of the prior times the likelihood"),
    "kl_q_p": (
        "KL(drawn ‖ posterior)",
        "nats",
        "of the draws without their weights; of SMC an upper bound, for a text picked by weight",
    ),
    "ess": ("effective sample size", "draws", "how many independent posterior draws they are worth"),
    "khat": ("k-hat", "", "shape of the weights' tail"),
    "max_weight": ("largest weight", "%", "of the sum of all"),
    "r_hat": ("R-hat", "", "near 1 where the chains agree, which does not prove that they are right"),
    "ess_bulk": ("bulk ESS", "draws", "for means; the fewest of any number"),
    "ess_tail": ("tail ESS", "draws", "for 5% and 95% quantiles; the fewest of any number"),
    "acceptance_rate": ("acceptance rate", "%", "of the chains' proposals"),
    "possible": ("possible draws", "%", "those that the evidence does not rule out"),
    "unique": ("different texts", "%", ""),
    "num_samples": ("draws", "draws", "for each prompt"),
    "lm_tokens_per_effective_draw": ("cost of an independent draw", "tokens", ""),
}
VARIETY = {  # of `diversity`
    "distinct_1": ("distinct-1", "%", "different tokens of all tokens"),
    "distinct_2": ("distinct-2", "%", "different pairs of tokens of all pairs"),
    "distinct_3": ("distinct-3", "%", "different triples of tokens of all triples"),
    "self_bleu": ("self-BLEU", "", "0 to 100; high where texts repeat each other"),
    "unique": ("different texts", "%", ""),
    "truncated": ("truncated texts", "%", "that reach the longest length without an end"),
    "not_roundtrip": ("second spellings", "%", "texts whose tokens do not survive decoding and encoding"),
}
