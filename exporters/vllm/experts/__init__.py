"""Routed experts of a compressed model in vLLM: what is loaded, and which kernel multiplies it."""
