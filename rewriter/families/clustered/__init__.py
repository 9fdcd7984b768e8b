"""Clustered attention: exp expanded around the mean query of a tile, near pairs of tiles exact."""
