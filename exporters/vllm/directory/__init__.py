"""The directory that is exported: where it may be written, and how it takes the place of an earlier one."""
