"""Speculative (Jacobi) decoding: several tokens a forward pass, equal to those of single steps."""
