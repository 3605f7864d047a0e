"""Models of transformers: which Linears they have, built without weights, run one layer at a time."""
