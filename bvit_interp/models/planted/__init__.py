"""Models in which it is known what happens."""
