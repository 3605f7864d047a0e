"""Recovery: a compressed layer is trained on the original's outputs."""
