"""Decoding on CUDA: a whole step captured as one graph."""
