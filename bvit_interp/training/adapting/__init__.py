"""Adapting a model: early exits, and transfer to other data."""
