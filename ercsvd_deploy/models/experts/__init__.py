"""Routed experts of a mixture: find them, split them into Linears, and stack them again."""
