"""The potentials of an optimal transport, by a quasi-Newton method on its dual.

Sinkhorn's iteration climbs the dual of the transport problem coordinate by coordinate and needs thousands of passes
over the images once the plan is nearly hard. The dual is a smooth concave function of only K numbers, the potentials
b_k; its gradient is 1/K - s_k with s_k the share of the images that cluster k gets (`Kernel.shares`), one pass and one
all-reduce of K numbers. So limited-memory BFGS (Nocedal 1980) finds the same plan in tens of passes. Its steps begin
as Sinkhorn's own, are measured by diag(s), and are cut back until the slope along them shows no overshoot; where even
that fails, a plain Sinkhorn step is taken, which always climbs.

Shape suffixes: K clusters.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.cluster.kernel import Kernel

logger = logging.getLogger(__name__)

_MEMORY = 10
_LONGEST = 20.0
"""largest change of a potential in one step, in nats"""
_LEAST_CURVATURE = {torch.float32: 1e-3, torch.float64: 1e-12}
"""of a step that is remembered, in units of diag(s): flatter ones are rounding errors"""
_SECONDS_BETWEEN_LINES = 10.0


class Found(NamedTuple):
    """Potentials and how well they spread the images."""

    potentials_K: Tensor
    """float64 on the CPU, mean 0"""
    error: float
    """sum over clusters of |images in the plan - N/K|, an upper bound of SeLa's sum over images of |c / c' - 1|"""
    imbalance: float
    """largest deviation of a cluster from N/K in the plan, as a fraction of N/K"""


class _Point(NamedTuple):
    potentials_K: Tensor
    shares_K: Tensor
    gradient_K: Tensor

    def found(self, images: int) -> Found:
        error_K = self.gradient_K.abs()
        return Found(self.potentials_K, images * float(error_K.sum()), len(error_K) * float(error_K.max()))


def quasi_newton(kernel: Kernel, start_K: Tensor, error: float, imbalance: float, *, passes: int) -> Found:
    """Potentials for the kernel as it is tilted, from others to begin with.

    Args:
        kernel: tilted with `start_K` as reference, or near it.
        start_K: float64 [K] on the CPU.
        error: to end at, see `Found`.
        imbalance: to end at, see `Found`; both must hold.
        passes: most passes over the images that `kernel` may count in all.

    Returns:
        The point with the smallest error that was seen.
    """
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    point = _evaluated(kernel, start_K)
    best = found = point.found(kernel.images)
    shown = time.monotonic()
    while not (found.error <= error and found.imbalance <= imbalance) and kernel.passes < passes:
        pulse.tick()
        shown = _tell(kernel, best, shown)
        step_K = _direction(history, point)
        after = _line_search(kernel, point, step_K, careful=bool(history))
        if after is None:
            history.clear()
            continue
        _remember(history, point, after, _LEAST_CURVATURE[kernel.dtype])
        point = after
        found = point.found(kernel.images)
        best = min(best, found, key=lambda one: one.error)
    return found if found.error <= error else best


def _evaluated(kernel: Kernel, potentials_K: Tensor) -> _Point:
    potentials_K = potentials_K - potentials_K.mean()
    shares_K = kernel.shares(potentials_K)
    return _Point(potentials_K, shares_K, shares_K - 1 / kernel.clusters)


def _metric(point: _Point) -> Tensor:
    """diag(s), the larger part of the Hessian; an empty cluster counts as a nearly empty one."""
    return point.shares_K.clamp(min=1e-3 / len(point.shares_K))


def _direction(history: deque[tuple[Tensor, Tensor]], point: _Point) -> Tensor:
    """Two-loop recursion on the remembered steps; without any, Sinkhorn's step."""
    if not history:
        clusters = len(point.shares_K)
        return -(clusters * point.shares_K.clamp(min=1e-9 / clusters)).log()
    metric_K, direction_K, weights = _metric(point), point.gradient_K.clone(), []
    for step_K, change_K in reversed(history):
        weights.append(step_K.dot(direction_K) / step_K.dot(change_K))
        direction_K -= weights[-1] * change_K
    step_K, change_K = history[-1]
    direction_K *= step_K.dot(change_K) / change_K.dot(change_K / metric_K) / metric_K
    for (step_K, change_K), weight in zip(history, reversed(weights), strict=True):
        direction_K += (weight - change_K.dot(direction_K) / step_K.dot(change_K)) * step_K
    longest = float(direction_K.abs().max())
    return -direction_K * min(1.0, _LONGEST / longest)


def _line_search(kernel: Kernel, point: _Point, step_K: Tensor, *, careful: bool) -> _Point | None:
    """The end of the step, shortened while the dual falls steeply there; None where no length is short enough."""
    slope, length = float(point.gradient_K.dot(step_K)), 1.0
    while length > 0.01:
        after = _evaluated(kernel, point.potentials_K + length * step_K)
        overshoot = float(after.gradient_K.dot(step_K))
        if not careful or overshoot <= -0.5 * slope:
            return after
        length *= max(0.1, min(0.5, slope / (slope - overshoot)))
    return None


def _remember(history: deque[tuple[Tensor, Tensor]], before: _Point, after: _Point, least: float) -> None:
    step_K, change_K = after.potentials_K - before.potentials_K, after.gradient_K - before.gradient_K
    if step_K.dot(change_K) > least * step_K.dot(_metric(before) * step_K):
        history.append((step_K, change_K))


def _tell(kernel: Kernel, best: Found, shown: float) -> float:
    now = time.monotonic()
    if now - shown < _SECONDS_BETWEEN_LINES or dist.rank():
        return shown
    logger.info(
        "optimal transport at sharpness %g: %d passes over the images, error %.3g, largest cluster error %.2g %%",
        kernel.sharpness, kernel.passes, best.error, 100 * best.imbalance,
    )  # fmt: skip
    return now
