"""Captioned images: labels, captions, crops, pairs, token shards, tokenizers."""
