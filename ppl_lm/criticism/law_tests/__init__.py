"""Tests of whether texts have a law: against other texts, and token by token against a known one."""
