"""The HTTP API: OpenAI's endpoints, and this server's additions."""

from paceline.serving.api.app import create_app

__all__ = ["create_app"]
