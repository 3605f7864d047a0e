"""What models read: texts, pictures and conversations, as sequences of token ids."""
