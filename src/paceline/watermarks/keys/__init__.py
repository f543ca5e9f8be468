"""How a watermark key gives random numbers: by preceding tokens, or by position."""
