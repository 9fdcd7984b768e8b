"""A study of clustered attention (math.md §8): exact for near pairs of clusters, an expansion for all others.

It came before the form that the compiler has (docs/clustered.md), and has variants that it does not have. It stands on
its own, on torch alone: no other part of polyattn calls it. In the order of processing:

- ``tiles``: features of tokens, a balanced tree, k-means; tiles, the clusters of one width
- ``moments``: moments of tiles of queries, of keys and of pairs; the scores that say which pairs are near
- ``plan``: what a call holds constant, tiles and near pairs
- ``fields``: far field, near field, their merge, the output
- ``gradients``: the substituted gradient; the consistent one is autograd's of the output
- ``causal``: the causal form
- ``dense``: the oracle, every formula by definition on n × n matrices
- ``costs``: FLOPs by stage
- ``measure``: a command that measures and writes the tables of docs/clustered.md; ``page`` prints them
"""
