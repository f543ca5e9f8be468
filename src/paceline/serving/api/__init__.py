"""The HTTP API: OpenAI's shapes, and what this server adds to them."""

from paceline.serving.api.app import create_app

__all__ = ["create_app"]
