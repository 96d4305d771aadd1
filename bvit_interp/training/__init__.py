"""Ways to obtain weights."""
