"""The training run: what is learned in which order, the optimizer step, checkpoints, the recipe."""
