"""Training: one loop, and the stages of the paper that use it."""
