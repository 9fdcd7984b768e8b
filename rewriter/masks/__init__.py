"""Which pairs of tokens are visible, and which of them are computed one by one."""
