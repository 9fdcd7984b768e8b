"""Emitted Python files of torch calls, for CPUs."""
