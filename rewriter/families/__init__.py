"""Families of feature maps in place of exp, one folder each."""
