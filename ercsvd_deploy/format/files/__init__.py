"""Files of tensors and what lies beside them: found, read, viewed, written whole or not at all."""
