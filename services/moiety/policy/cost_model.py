"""The cost of a batch on an expert replica: `t = a + b·activated weight bytes + c·rows`, fitted from replies as they arrive.

One model per (device, dtype). Routers fit it; autoscaling, placement and the simulator read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

# Weight of earlier samples along a direction after one more sample in that direction: a memory of ~200 samples.
FORGET = 0.995
ERRORS_KEPT = 64
SETTLED = 16  # samples after which an outlier is taken for noise: a page fault, a preempted thread
CLIP = 0.5  # a settled model limits one sample's residual to this fraction of the prediction
# Prior precision of the costs (fixed, per byte, per row), relative to the time of the first sample. Without a seed, a few
# similar decode batches do not separate the three costs. The least precise, the cost per byte, then gets most of the time:
# weights are known to bound decode.
DOUBT = np.array([1e-3, 1e-4, 1e-3])
REGULAR = 1e-12  # added to the scaled information matrix; larger than rounding errors
SEED_WEIGHT = 4.0  # number of samples that a seed counts as, in each cost

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch that a replica computed."""

    weight_bytes: float  # total of its distinct experts, as stored
    rows: float  # (token, expert) pairs
    seconds: float  # device time, without the queue


@dataclass(frozen=True, slots=True)
class KernelCost:
    """The three fitted costs, how certain they are, and the errors of past predictions. `KernelCost()` predicts 0."""

    fixed_s: float = 0.0  # a: seconds per batch
    s_per_byte: float = 0.0  # b: seconds per byte of activated weights
    s_per_row: float = 0.0  # c: seconds per row
    seen: int = 0  # samples
    information: tuple[float, ...] = ()  # information matrix of the three costs, [3 * 3] row-major; units of 1 / cost²
    errors: tuple[float, ...] = field(default=(), repr=False)  # |t - predicted| / t of the last ERRORS_KEPT samples

    @classmethod
    def seeded(cls, fixed_s: float, s_per_byte: float, s_per_row: float) -> KernelCost:
        """Returns a model that starts from costs measured elsewhere and moves away only as samples contradict them."""
        costs = np.array([fixed_s, s_per_byte, s_per_row])
        least = 1e-3 * np.array([1e-6, 1e-15, 1e-9])  # so that a cost seeded as 0 can still be learned
        return _model(costs, np.diag(SEED_WEIGHT / 9.0 / np.maximum(costs, least) ** 2), 0, ())

    @property
    def error(self) -> float | None:
        """Median relative error of predicting the last ERRORS_KEPT samples, each before it was learned; None without any."""
        return median(self.errors) if self.errors else None

    def predict(self, weight_bytes: float, rows: float) -> float:
        """Predicts the seconds of a batch of `rows` whose distinct experts have `weight_bytes` in total."""
        return self.fixed_s + self.s_per_byte * weight_bytes + self.s_per_row * rows

    def busy(self, batches_per_s: float, bytes_per_s: float, rows_per_s: float) -> float:
        """Returns the fraction of a device's time that the given rates of work take; above 1, one device is not enough."""
        return self.fixed_s * batches_per_s + self.s_per_byte * bytes_per_s + self.s_per_row * rows_per_s

    def fixed_share(self, weight_bytes: float, rows: float) -> float:
        """Returns the fixed cost as a fraction of the batch's time. It stays if another replica takes some experts and rows."""
        whole = self.predict(weight_bytes, rows)
        return self.fixed_s / whole if whole > 0 else 0.0


def update(model: KernelCost, sample: Sample) -> KernelCost:
    """Returns `model` after learning `sample`. Ignores an impossible sample (no time, negative counts). Takes about 25 µs.

    Recursive least squares of the *relative* error: a decode batch of 0.1 ms and a prefill chunk of 100 ms count alike.
    Forgetting acts only along the sample's own direction (Cao & Schwartz, Automatica 36, 2000): an hour of decode does
    not erase what prefill taught. Negative costs are replaced by the nearest non-negative ones in the fit's own metric.
    """
    x = np.array([1.0, sample.weight_bytes, sample.rows])
    seconds = sample.seconds
    if not (np.isfinite(x).all() and np.isfinite(seconds) and seconds > 0 and x.min() >= 0):
        return model
    costs = _costs(model)
    predicted = float(x @ costs)
    information = _information(model, x, seconds)
    settled = model.seen >= SETTLED and predicted > 0
    scale = min(max(predicted, seconds / 8), seconds * 8) if predicted > 0 else seconds
    residual = (seconds - predicted) / scale
    if settled:
        residual = min(max(residual, -CLIP), CLIP)
    x = x / scale
    known = information @ x
    along = float(x @ known)
    if along > 1.0:  # a direction with less information than one sample has nothing to forget
        information = information - (1.0 - FORGET) / along * np.outer(known, known)
    information = information + np.outer(x, x)
    costs = _non_negative(costs + _solve(information, x) * residual, information)
    error = abs(sample.seconds - predicted) / sample.seconds
    errors = (*model.errors[-ERRORS_KEPT + 1 :], error) if predicted > 0 else ()
    return _model(costs, information, model.seen + 1, errors)


def fit(samples: Iterable[Sample], model: KernelCost | None = None) -> KernelCost:
    """Returns `model` (default: an empty one) after learning all `samples`, for example those of `moiety bench experts`."""
    model = KernelCost() if model is None else model
    for sample in samples:
        model = update(model, sample)
    return model


def expert_load(
    model: KernelCost, rows_per_s: npt.ArrayLike, activations_per_s: npt.ArrayLike, expert_bytes: float
) -> npt.NDArray[np.float64]:
    """Returns the device seconds per second that each expert needs, [layers, experts]: the load that placement balances.

    Decode activates experts for few rows each, so activations dominate. Prefill has many rows per expert, so rows dominate.
    """
    reading = model.s_per_byte * expert_bytes * np.asarray(activations_per_s, dtype=np.float64)
    return reading + model.s_per_row * np.asarray(rows_per_s, dtype=np.float64)


def _costs(model: KernelCost) -> Vector:
    return np.array([model.fixed_s, model.s_per_byte, model.s_per_row])


def _information(model: KernelCost, x: Vector, seconds: float) -> Matrix:
    if model.information:
        return np.array(model.information).reshape(3, 3)
    # A regressor of 0 tells nothing about its cost: the floor keeps the matrix regular.
    least = np.array([1.0, 1.0, 1e-3])
    return np.diag(DOUBT * (np.maximum(x, least) / seconds) ** 2)


def _model(costs: Vector, information: Matrix, seen: int, errors: tuple[float, ...]) -> KernelCost:
    fixed_s, s_per_byte, s_per_row = costs.tolist()
    return KernelCost(fixed_s, s_per_byte, s_per_row, seen, tuple(information.ravel().tolist()), errors)


def _solve(information: Matrix, right: Vector) -> Vector:
    """Returns `information⁻¹ · right`. Scales both first, because bytes and rows differ by many orders of magnitude.

    Along a direction that no sample had, rounding may erase the prior's small information. REGULAR then keeps the matrix
    invertible.
    """
    scale = 1.0 / np.sqrt(np.diag(information))
    scaled = information * np.outer(scale, scale) + REGULAR * np.eye(len(right))
    solved: Vector = scale * np.linalg.solve(scaled, scale * right)
    return solved


def _non_negative(costs: Vector, information: Matrix) -> Vector:
    """Returns the non-negative costs nearest to `costs` in the metric `information`.

    Tries every way to set one, two or all of the costs to 0, and fits the others. Takes the nearest result without a
    negative cost.
    """
    if costs.min() >= 0:
        return costs
    best, least = np.zeros(3), float("inf")
    target = information @ costs
    for size in range(3):
        for kept in combinations(range(3), size):
            index = list(kept)
            candidate = np.zeros(3)
            if index:
                candidate[index] = _solve(information[np.ix_(index, index)], target[index])
            away = candidate - costs
            distance = float(away @ information @ away)
            if candidate.min() >= 0 and distance < least:
                best, least = candidate, distance
    return best
