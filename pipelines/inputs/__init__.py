"""What a recipe names, opened: model, texts, pictures."""
