"""Low-rank approximation of one weight: tensors in, tensors out, no files and no settings."""
