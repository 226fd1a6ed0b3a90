"""What `sample_speed.py` draws, beside what, and how it tells of it."""
