"""The recover stages: compressed layers are trained on the original layers' outputs."""
