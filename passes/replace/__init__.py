"""One operator in the place of each site."""
