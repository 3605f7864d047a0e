"""How every matrix of a quantize stage is stored, and what that takes: from names and shapes alone."""
