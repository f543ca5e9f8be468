"""What structured output shares: matcher, output parser, tool formats."""
