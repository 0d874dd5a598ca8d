"""Diagnoses: what a guide or draws amount to, as figures with errors and a verdict in words."""
