"""What is known of a model without its weights: its layers, their Linears, the sizes of all the rest."""
