"""What stands on disk: names and shapes of compressed checkpoints, packed integers, tensor files, checksums."""
