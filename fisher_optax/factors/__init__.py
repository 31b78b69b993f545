"""How Kronecker factors follow the gradients: one file a rule."""

from .outer_product import outer_product as outer_product
