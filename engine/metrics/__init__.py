"""Measurements of models: reconstruction, retrieval, colours, caption classes, FID and KID."""
