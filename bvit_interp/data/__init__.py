"""Data sets by name, geometry, and the one pass over the images."""
