"""What runs leave on disk for each other: finished pieces, fingerprints, locks."""
