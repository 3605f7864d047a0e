"""Compressed checkpoints in transformers: the modules that take the places of Linears, and their loader."""
