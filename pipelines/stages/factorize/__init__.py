"""The factorize stage: ranks, factors, and the inputs they are made for."""
