"""The work of `crossval`: folds of whole places, out-of-fold predictions, their score, suspects and the ensemble."""
