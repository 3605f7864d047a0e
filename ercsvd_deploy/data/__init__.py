"""Inputs of models: texts, pictures and conversations, as sequences of token ids."""
