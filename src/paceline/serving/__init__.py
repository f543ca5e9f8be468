"""Many requests at once on one engine, and an API in front of them."""
