"""Sparse masks over shared weights, for each step or each part of the data."""
