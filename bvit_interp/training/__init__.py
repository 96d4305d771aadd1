"""Training, pruning and adapting of models."""
