"""C++ for programs in tiles on CPUs: large values are made and summed tile by tile, in the cache."""
