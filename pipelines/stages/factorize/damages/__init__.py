"""The damages stage: what every storage on offer would cost the model, measured before any is chosen."""
