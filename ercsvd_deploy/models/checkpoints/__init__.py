"""A model and the tensors of its checkpoint: which belongs where, and whether they fit."""
