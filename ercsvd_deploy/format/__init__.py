"""The format on disk: names and shapes of a compressed checkpoint, packed integers, files, checksums."""
