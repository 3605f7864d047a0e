"""Routed experts: the inputs that the router sends each, its integers, and their tables in the report."""
