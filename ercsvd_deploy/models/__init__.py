"""Models of transformers: which Linears they have, built without memory, run one layer at a time."""
