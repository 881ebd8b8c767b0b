"""What is decided about all photos: groups, splits, clusters and weights."""
