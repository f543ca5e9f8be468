from tests.cli.conftest import paceline, prompts

__all__ = ["paceline", "prompts"]
