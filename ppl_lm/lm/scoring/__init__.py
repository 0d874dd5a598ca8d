"""Scoring: log-probabilities of given texts by teacher forcing, and the shortcuts that are taken where they change nothing."""
