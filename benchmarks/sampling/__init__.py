"""The sampling benchmark: the plan, the measured rows, baselines, tables and plot of `sample_speed.py`."""
