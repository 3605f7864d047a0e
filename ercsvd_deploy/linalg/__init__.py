"""Low-rank approximation of one weight: tensors in, tensors out."""
