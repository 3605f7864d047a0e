"""Report and plan on the terminal."""
