"""Image tokens from captions: the KV cache, the decoders on CPU and CUDA, the sampler. Token ids only."""
