"""Odd quintics ``a x + b x³ + c x⁵`` that, one after the other, take singular values in (0, 1] to about 1."""

import functools
import math
from collections.abc import Iterable

import numpy as np

Quintic = tuple[float, float, float]
Polynomial = tuple[Quintic, ...]


@functools.lru_cache
def polar_express(
    steps: int = 5, *, lower: float = 1e-3, cushion: float = 0.02407327424182761, safety: float = 1.01
) -> Polynomial:
    """The Polar Express: each quintic is the best one for the interval that the steps before it left.

    Five steps take singular values in [1e-2, 1] into [.876, 1.124], eight into 1 to five digits.

    Args:
      steps: how many quintics, 1 or more.
      lower: the smallest singular value, of a matrix of spectral norm at most 1, that should reach 1.
      cushion: a fit starts no lower than ``cushion`` times the interval's upper end. The default is the authors';
        larger is tamer, as the slope at 0 never exceeds a bound.
      safety: all but the last quintic are those of ``x / safety``, so that rounding above 1 cannot diverge;
        ``safety=1.0`` gives the published digits.

    Returns:
      ``steps`` triples (a, b, c).

    Raises:
      ValueError: for values outside the ranges above.

    Source: Amsel, Persson, Musco & Gower 2025 (arXiv 2505.16932), Algorithm 1 and Section 4.

    >>> a, b, c = polar_express(1, safety=1.0)[0]
    >>> round(a, 6), round(b, 6), round(c, 6)
    (8.287212, -23.595887, 17.300387)
    """
    _check_steps("polar_express", steps)
    if not (0 < lower < 1 and 0 <= cushion < 1 and safety >= 1):
        raise ValueError(
            "polar_express: lower must lie in (0, 1), cushion in [0, 1) and safety be at least 1; "
            f"got lower={lower}, cushion={cushion}, safety={safety}."
        )
    quintics, upper = [], 1.0
    for _ in range(steps):
        a, b, c = _best_quintic(max(lower, cushion * upper), upper)

        def p(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        centre = 2 / (p(lower) + p(upper))
        quintics.append((centre * a, centre * b, centre * c))
        lower = centre * p(lower)
        upper = 2 - lower
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in quintics[:-1]]
    return (*safe, quintics[-1])


def _best_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic nearest to 1 in maximum norm on [lower, upper]: its error alternates at four nodes (Remez)."""
    if lower / upper >= 1 - 5e-6:  # the system below is singular to rounding: take the limit
        return 15 / (8 * upper), -10 / (8 * upper**3), 3 / (8 * upper**5)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    a = b = c = error = math.inf
    for _ in range(100):
        last, nodes = error, np.array([lower, q, r, upper])
        system = np.stack([nodes, nodes**3, nodes**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4)).tolist()
        if abs(error - last) < 1e-15:
            break
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def jordan(steps: int = 5) -> Polynomial:
    """Jordan's quintic, ``steps`` times: steep at 0, singular values end anywhere in about [.68, 1.13].

    Args:
      steps: how often, 1 or more; the default is Muon's.

    Raises:
      ValueError: for fewer than one step.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    >>> jordan(1)
    ((3.4445, -4.775, 2.0315),)
    """
    _check_steps("jordan", steps)
    return ((3.4445, -4.7750, 2.0315),) * steps


def you() -> Polynomial:
    """You's five quintics: as steep as Jordan's together, singular values of 1e-2 and more end in [.978, 1.032].

    Source: Jiacheng You 2025, published with modded-nanogpt.

    >>> len(you())
    5
    """
    return (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )


def as_polynomial(value: Iterable[Iterable[float]]) -> Polynomial:
    """``value`` as a tuple of triples of floats.

    Args:
      value: one (a, b, c) for each step, from `polar_express`, `jordan`, `you` or anywhere else.

    Raises:
      ValueError: if it is empty, or holds anything but triples of finite numbers.

    >>> as_polynomial([[1.875, -1.25, 0.375]])
    ((1.875, -1.25, 0.375),)
    """
    wanted = "wanted a sequence of (a, b, c), one for each step, as `polar_express()`, `jordan()` and `you()` return"
    try:
        steps = tuple(tuple(float(x) for x in step) for step in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"polynomial: {wanted}; got {value!r}.") from error
    if not steps or not all(len(step) == 3 and all(map(math.isfinite, step)) for step in steps):
        raise ValueError(f"polynomial: {wanted}, all finite; got {value!r}.")
    return tuple((a, b, c) for a, b, c in steps)


def _check_steps(name: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name}: steps must be an integer of at least 1; got {steps!r}.")
