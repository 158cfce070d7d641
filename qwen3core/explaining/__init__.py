"""What a decision comes from, as numbers (``attribution.py``)."""

from .attribution import Attribution, Token, contributions, integrated_gradients, lens, tokens

__all__ = ["Attribution", "Token", "contributions", "integrated_gradients", "lens", "tokens"]
