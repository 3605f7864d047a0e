"""What can be done to a model, in order."""
