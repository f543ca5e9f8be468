"""Documents in prompts: their keys and values are computed once, apart, and reused."""
