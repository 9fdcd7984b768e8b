"""The exact rules: each is an identity of math.md."""
