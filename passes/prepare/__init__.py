"""Every spelling becomes a few aten operations."""
