"""Evaluation of models on texts and benchmark suites: one file a suite."""
