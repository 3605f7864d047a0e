"""What a model is worth, alone and beside its original."""
