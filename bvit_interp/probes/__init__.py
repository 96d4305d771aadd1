"""How a model is watched and changed."""
