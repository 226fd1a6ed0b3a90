"""Captioned pictures: labels, captions, crops, pairs, token shards, and the drawn demo set."""
