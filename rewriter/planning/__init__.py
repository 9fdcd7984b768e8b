"""Contraction order by cost."""
