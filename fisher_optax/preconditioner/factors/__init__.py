"""How Kronecker factors follow the gradients: one file a rule."""

from ..contracts import Kronecker as Kronecker
from .inputs import inputs as inputs
from .kronecker import kronecker as kronecker
from .kronecker import tikhonov as tikhonov
from .kullback_leibler import kullback_leibler as kullback_leibler
from .kullback_leibler import running_mean as running_mean
from .outer_product import outer_product as outer_product
from .projector_splitting import projector_splitting as projector_splitting
