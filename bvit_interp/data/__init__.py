"""What a model is shown: the catalog, its data sets, and the geometry of image and mask."""
