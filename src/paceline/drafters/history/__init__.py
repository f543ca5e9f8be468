"""Data that drafters keep between runs."""
