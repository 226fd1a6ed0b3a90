"""Configuration of models and training runs: strict, frozen sections."""
