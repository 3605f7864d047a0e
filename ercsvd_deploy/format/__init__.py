"""What stands on disk: names and shapes of compressed checkpoints, integers, tensor files, checksums."""
