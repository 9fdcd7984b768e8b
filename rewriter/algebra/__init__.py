"""Index notation: tensors, expressions, programs, and their dense meaning."""
