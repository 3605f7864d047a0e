"""One budget for many matrices: a rank each, or an option each."""
