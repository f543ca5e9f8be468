"""Training: data from the model itself, and models learnt from it."""
