"""Routed experts of a mixture: found, taken apart into Linears, put together again."""
