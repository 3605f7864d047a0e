"""What a run found out: declared, and shown on the terminal, as a page and as a model card."""
