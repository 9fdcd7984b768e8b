"""What happens when a site runs: its operators, its state, its checks."""
