"""What is trained beside a model: early exits and transfer to other data."""
