"""Arithmetic worth a kernel. Imports torch, triton and xformers only; every op has a reference in plain PyTorch."""
