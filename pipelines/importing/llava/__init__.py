"""Original-format LLaVA checkpoints, converted to the layout of the hub."""
