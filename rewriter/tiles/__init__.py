"""Tiles of similar tokens, which pairs of them are near, and what families in tiles say of themselves."""
