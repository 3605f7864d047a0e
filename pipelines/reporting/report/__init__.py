"""The report: declared, collected from a run, written, read again and judged again."""
