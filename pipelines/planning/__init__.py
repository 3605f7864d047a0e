"""What a recipe will do, take and need, before a weight is read."""
