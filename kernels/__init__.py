"""Kernels, one op a file. Imports torch and triton only; every op has a reference in plain PyTorch."""
