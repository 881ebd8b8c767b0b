"""What is decided about all photos: groups, splits, clusters and weights."""

BALANCE = 1.0
"""How far weights even out the two classes inside each cluster, from 0 to 1: the default of --balance."""
