"""The ways to choose ranks: what shapes allow, and what a run decides."""
