"""Paths to what is rare: tempered posteriors, and levels of a reward."""
