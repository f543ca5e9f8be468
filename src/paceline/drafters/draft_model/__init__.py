"""Shared by the drafters that run a model: growth, calibration, stop rules, tokenizers."""
