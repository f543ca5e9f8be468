"""Several engines on a Ray cluster: servers behind one address, and workers for one batch."""
