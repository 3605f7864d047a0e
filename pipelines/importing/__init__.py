"""Checkpoints of other formats, converted once."""
