"""Checkpoints of other projects -> model folders. Nothing in a foreign file is ever executed."""
