"""Many requests at once, each with the text it would get alone."""
