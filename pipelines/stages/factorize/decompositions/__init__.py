"""Decompositions of decoder Linears: made in one pass, kept on disk until ranks are chosen."""
