"""From captions to ranked pictures: KV cache, sampler, pipeline."""
