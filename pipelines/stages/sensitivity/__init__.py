"""Sensitivity: the Fisher information of every Linear's outputs, and token weights."""
