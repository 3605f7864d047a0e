"""The layers of a compressed model in vLLM: created, loaded, multiplied."""
