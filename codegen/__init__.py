"""From a plan to code: token loops, their meaning in plain torch, and the CPU and Triton targets."""
