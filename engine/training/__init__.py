"""One training loop, one small module per stage, DeepSpeed glue, checkpoints."""
