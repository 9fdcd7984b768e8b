"""Polynomials of the logits: monomials of queries and keys as features."""
