"""Decoding on a CPU: packed and 8-bit weights."""
