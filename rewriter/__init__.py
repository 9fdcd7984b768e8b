"""The mathematics: index-notation algebra, rewrite rules, contraction order, costs; neither torch.fx nor triton."""
