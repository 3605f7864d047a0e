"""The test suite: CPU, offline, seeded; numbers are compared with naive references."""
