"""The factorize stage: the choice of ranks, and the factors of decoder and vision Linears."""
