"""The recipe, one YAML file: its sections, stages and gates, how it is read and how mistakes are reported."""
