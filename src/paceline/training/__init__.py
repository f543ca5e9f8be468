"""Training: data that the model writes itself, and models learned from it."""
