"""Pure functions of arrays: orthogonalisation, eigenbases that follow a matrix, symmetric storage."""

from .blocks import blockwise, cholesky_qr, diagonal, overwritten, sequential
from .eigenbasis import (
    descending,
    dominant_eigenvector,
    eigenbasis,
    followed_by_products,
    keep_last_good,
    off_diagonality,
    orthogonal_iteration,
    range_of_rows,
    strongest_rows,
)
from .following import followed, nearest_axes, project
from .inverse_cholesky import inverse_cholesky
from .krylov import conjugate_gradient
from .orthogonalize import direct_flops, gram_flops, orthogonalize, restart_steps
from .polynomials import as_polynomial, jordan, polar_express, you
from .products import into_basis, out_of_basis, pack, second_moment, times, unit_frobenius, unit_scale, unpack
from .roots import check_exponent, cholesky_inverse, has_exponent, matrix_power

__all__ = [
    "as_polynomial",
    "blockwise",
    "check_exponent",
    "cholesky_inverse",
    "cholesky_qr",
    "conjugate_gradient",
    "descending",
    "diagonal",
    "direct_flops",
    "dominant_eigenvector",
    "eigenbasis",
    "followed",
    "followed_by_products",
    "gram_flops",
    "has_exponent",
    "into_basis",
    "inverse_cholesky",
    "jordan",
    "keep_last_good",
    "matrix_power",
    "nearest_axes",
    "off_diagonality",
    "orthogonal_iteration",
    "orthogonalize",
    "out_of_basis",
    "overwritten",
    "pack",
    "polar_express",
    "project",
    "range_of_rows",
    "restart_steps",
    "second_moment",
    "sequential",
    "strongest_rows",
    "times",
    "unit_frobenius",
    "unit_scale",
    "unpack",
    "you",
]
