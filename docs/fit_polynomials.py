"""Fits the polynomials of kernels/cpu/vectors.h: for each, the coefficients and the largest error.

    python docs/fit_polynomials.py

Lawson's algorithm: least squares, whose weights grow where the error is large until it is the same everywhere. That is
the polynomial whose largest error is smallest. The error is relative to exp, log1p and softplus, and absolute of sine
and cosine, which are multiplied by a radius.
"""

from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]
POINTS, ITERATIONS = 4000, 400


def fit(target: Function, powers: range, interval: tuple[float, float], scale: Function) -> tuple[np.ndarray, float]:
    """Coefficients of the given powers that make the largest |scale * (polynomial - target)| least, and that error."""
    low, high = interval
    x = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    basis, values, weights = np.stack([x**k for k in powers], 1), target(x), np.full(POINTS, 1 / POINTS)
    for _ in range(ITERATIONS):
        factors = np.sqrt(weights) * scale(x)
        coefficients, *_ = np.linalg.lstsq(basis * factors[:, None], values * factors, rcond=None)
        errors = np.abs((basis @ coefficients - values) * scale(x))
        weights = weights * errors
        weights /= weights.sum()
    return coefficients, errors.max()


half_ln_2, root_half = np.log(2) / 2, np.sqrt(0.5)
FITS: dict[str, tuple[Function, range, tuple[float, float], Function]] = {
    "(exp(f) - 1 - f) / f^2": (
        lambda f: (np.expm1(f) - f) / f**2,
        range(4),
        (-half_ln_2, half_ln_2),
        lambda f: f**2 * np.exp(-f),
    ),
    "(log1p(f) - f + f^2 / 2) / f^3": (
        lambda f: (np.log1p(f) - f + f**2 / 2) / f**3,
        range(6),
        (root_half - 1, 2 * root_half - 1),
        lambda f: f**3 / np.log1p(f),
    ),
    "(log1p(t) / t - 1) / t": (
        lambda t: (np.log1p(t) / t - 1) / t,
        range(7),
        (1e-6, 1.0),
        lambda t: t**2 / np.log1p(t),
    ),
    "sin(pi f) / f": (lambda f: np.sin(np.pi * f) / f, range(0, 8, 2), (1e-9, 0.25), lambda f: f),
    "cos(pi f)": (lambda f: np.cos(np.pi * f), range(0, 8, 2), (0.0, 0.25), np.ones_like),
}

for name, arguments in FITS.items():
    coefficients, error = fit(*arguments)
    print(f"{name}: {', '.join(f'{c:.10g}' for c in coefficients)}; error {error:.2g}")
