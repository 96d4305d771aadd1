"""Measures over a data set, as torchmetrics: any number of processes."""
