"""Whether a compressed model is still worth what its recipe asks."""
