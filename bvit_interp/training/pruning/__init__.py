"""Sparse masks over shared weights, per step or per subset."""
