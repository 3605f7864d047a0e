"""Share one budget between many matrices: by ranks, or by any options that have a cost and a damage."""
