"""The YAML file that says what is done: sections, stages, gates, and how they are read and refused."""
