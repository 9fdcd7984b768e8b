"""Positive random features of exp (FAVOR+)."""
