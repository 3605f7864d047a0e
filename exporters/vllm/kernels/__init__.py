"""Kernels that multiply matrices in vLLM: our operator, vLLM's choice, and the record of a served model."""
