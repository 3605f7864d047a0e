"""Sensitivity: how much the model minds errors of every Linear's output."""
