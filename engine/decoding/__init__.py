"""Decoding: image tokens from text tokens. The KV cache, the slot table, decoders on CPU and CUDA, the sampler."""
