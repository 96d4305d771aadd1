"""Measures over a data set, as torchmetrics, in any number of processes."""
