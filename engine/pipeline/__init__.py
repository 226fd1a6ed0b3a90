"""Captions to ranked pictures, and what may be asked for: the pipeline and the drawing commands."""
