"""What is done to a gradient with the bases at hand: one file an application."""

from .damped import damped as damped
from .damped import eigenvalue_corrected as eigenvalue_corrected
from .eigenbasis import adam as adam
from .eigenbasis import in_eigenbasis as in_eigenbasis
from .eigenvalues import inverse_root_of_eigenvalues as inverse_root_of_eigenvalues
from .orthogonal import orthogonal as orthogonal
from .power import power as power
from .rank1 import rank1_adam as rank1_adam
from .rooted_polar import rooted_polar as rooted_polar
from .scaled_polar import scaled_polar as scaled_polar
