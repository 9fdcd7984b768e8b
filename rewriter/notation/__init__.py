"""Programs and plans as people read them."""
