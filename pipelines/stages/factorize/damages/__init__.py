"""The damages stage: the damage of every storage on offer, measured before any is chosen."""
