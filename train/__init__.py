"""Training: configuration, the DeepSpeed engine, one readable loop, evaluation and checkpoints."""
