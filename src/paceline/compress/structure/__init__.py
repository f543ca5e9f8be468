"""Methods that leave parts of a model out, or train what is left, before it is quantised."""
