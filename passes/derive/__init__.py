"""From a form of attention to kernel specifications: trace, lift, rules, plan."""
