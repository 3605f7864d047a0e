"""Many variations of one recipe, side by side."""
