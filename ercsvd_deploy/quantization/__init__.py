"""Integers for one weight or one pair of factors: tensors in, tensors out."""
