"""Continuous batching of many requests on one engine, and the HTTP API in front of it."""
