"""Planted models: it is known what each of their steps does."""
