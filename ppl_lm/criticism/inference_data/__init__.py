"""Draws as what ArviZ reads, and back."""
