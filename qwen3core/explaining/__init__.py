"""What a decision comes from, as numbers (``attribution.py``) and as a page to open in a browser (``page.py``)."""

from .attribution import Attribution, Token, contributions, integrated_gradients, lens, tokens
from .page import explain

__all__ = ["Attribution", "Token", "contributions", "explain", "integrated_gradients", "lens", "tokens"]
