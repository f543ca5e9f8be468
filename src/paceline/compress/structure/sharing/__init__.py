"""What methods share that let layers have the matrices of other layers."""
