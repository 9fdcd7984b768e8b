"""The mathematics: index-notation algebra, rewrite rules, contraction order, costs. Imports neither torch.fx nor triton."""
