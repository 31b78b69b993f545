"""What is done to a gradient with the bases at hand: one file an application."""

from .eigenbasis import adam as adam
from .eigenbasis import in_eigenbasis as in_eigenbasis
from .orthogonal import orthogonal as orthogonal
