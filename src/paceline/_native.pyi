"""Types of the compiled module; `native/` holds its source."""

from paceline.core import Floats, Tokens

def top(logits: Floats, k: int) -> tuple[Tokens, Floats]: ...
