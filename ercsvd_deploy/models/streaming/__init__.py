"""Run a model one decoder layer at a time, and observe the inputs of its Linears."""
