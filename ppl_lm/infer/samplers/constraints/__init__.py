"""Constraints by a checker: next tokens that it allows, and rejection that remembers what led nowhere."""
