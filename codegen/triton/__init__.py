"""Emitted Triton files, for GPUs."""
