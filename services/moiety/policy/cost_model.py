"""What a batch costs an expert replica: `t = a + b·activated weight bytes + c·rows`, fitted from replies as they come.

One model per (device, dtype). Policy, placement and the simulator read it; routers fit it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

FORGET = (
    0.995  # what is known of a direction counts for this much after one more sample in that direction: ~200 samples
)
ERRORS_KEPT = 64
SETTLED = 16  # samples after which one that is far off is taken for noise: a page fault, a preempted thread
CLIP = 0.5  # of the prediction: how far a settled model lets one sample pull
# Without a seed, a few decode batches alike cannot tell the three costs apart; weights then get most of the time, as
# decode is known to be bound by them. Relative to the time of the first sample; the least costs the least.
DOUBT = np.array([1e-3, 1e-4, 1e-3])
REGULAR = 1e-12  # of a direction's certainty, above what rounding leaves
SEED_WEIGHT = 4.0  # samples that a seed counts for, in each cost

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch that a replica computed."""

    weight_bytes: float  # of the distinct experts in it, as they are held
    rows: float  # (token, expert) pairs
    seconds: float  # of the device, without the queue


@dataclass(frozen=True, slots=True)
class CostModel:
    """A fit, its certainty and its error. `CostModel()` knows nothing yet and predicts 0."""

    fixed_s: float = 0.0  # a: seconds per batch
    s_per_byte: float = 0.0  # b: seconds per byte of activated weights
    s_per_row: float = 0.0  # c: seconds per row
    seen: int = 0  # samples
    information: tuple[float, ...] = ()  # [3 * 3] row-major, of the three costs; units of 1 / cost²
    errors: tuple[float, ...] = field(default=(), repr=False)  # |t - predicted| / t of the last ERRORS_KEPT samples

    @classmethod
    def seeded(cls, fixed_s: float, s_per_byte: float, s_per_row: float) -> CostModel:
        """A model that starts from costs measured elsewhere and leaves them as far as samples contradict."""
        costs = np.array([fixed_s, s_per_byte, s_per_row])
        least = 1e-3 * np.array([1e-6, 1e-15, 1e-9])  # a cost seeded as 0 may still be learned
        return _model(costs, np.diag(SEED_WEIGHT / 9.0 / np.maximum(costs, least) ** 2), 0, ())

    @property
    def error(self) -> float | None:
        """Median relative error of the latest predictions, each made before its sample was learned; None at first."""
        return median(self.errors) if self.errors else None

    def predict(self, weight_bytes: float, rows: float) -> float:
        """Seconds of a batch of `rows` that activates experts of `weight_bytes` together."""
        return self.fixed_s + self.s_per_byte * weight_bytes + self.s_per_row * rows

    def busy(self, batches_per_s: float, bytes_per_s: float, rows_per_s: float) -> float:
        """Fraction of a device's time that this work takes; above 1, more than one device."""
        return self.fixed_s * batches_per_s + self.s_per_byte * bytes_per_s + self.s_per_row * rows_per_s

    def fixed_share(self, weight_bytes: float, rows: float) -> float:
        """The part of a batch's time, 0 to 1, that stays when its experts and rows are shared with another replica."""
        whole = self.predict(weight_bytes, rows)
        return self.fixed_s / whole if whole > 0 else 0.0

    def rows_at_knee(self, expert_bytes: float) -> float:
        """Rows of one expert that cost as much as reading its weights; inf where rows are free.

        Below, two replicas with half the rows each would read the weights twice and gain little.
        """
        return self.s_per_byte * expert_bytes / self.s_per_row if self.s_per_row > 0 else float("inf")

    def capacity(self, weight_bytes: float, rows: float, busy: float = 1.0) -> float:
        """Rows per second of one replica whose batches are like this one, at a busy fraction; inf if they are free."""
        seconds = self.predict(weight_bytes, rows)
        return busy * rows / seconds if seconds > 0 else float("inf")


def update(model: CostModel, sample: Sample) -> CostModel:
    """`model` after one more sample; unchanged by one that cannot be (no time, negative counts). Some 25 µs.

    Recursive least squares of the *relative* error: a decode batch of 0.1 ms and a prefill chunk of 100 ms count alike.
    Forgetting acts only along the sample's own direction (Cao & Schwartz, Automatica 36, 2000): an hour of decode does
    not wear out what prefill taught. Costs stay non-negative: the nearest such costs in the fit's own metric.
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
    if along > 1.0:  # a direction less certain than one sample has nothing to forget
        information = information - (1.0 - FORGET) / along * np.outer(known, known)
    information = information + np.outer(x, x)
    costs = _non_negative(costs + _solve(information, x) * residual, information)
    error = abs(sample.seconds - predicted) / sample.seconds
    errors = (*model.errors[-ERRORS_KEPT + 1 :], error) if predicted > 0 else ()
    return _model(costs, information, model.seen + 1, errors)


def fit(samples: Iterable[Sample], model: CostModel | None = None) -> CostModel:
    """`model`, or one that knows nothing, after all of `samples`: the rows of `moiety bench experts`, for a start."""
    model = CostModel() if model is None else model
    for sample in samples:
        model = update(model, sample)
    return model


def expert_load(
    model: CostModel, rows_per_s: npt.ArrayLike, activations_per_s: npt.ArrayLike, expert_bytes: float
) -> npt.NDArray[np.float64]:
    """Device seconds per second that each expert asks for, [layers, experts]: what placement balances.

    Decode activates experts for few rows each, so activations decide; prefill brings many rows, so rows decide.
    """
    reading = model.s_per_byte * expert_bytes * np.asarray(activations_per_s, dtype=np.float64)
    return reading + model.s_per_row * np.asarray(rows_per_s, dtype=np.float64)


def _costs(model: CostModel) -> Vector:
    return np.array([model.fixed_s, model.s_per_byte, model.s_per_row])


def _information(model: CostModel, x: Vector, seconds: float) -> Matrix:
    if model.information:
        return np.array(model.information).reshape(3, 3)
    # Of a cost whose regressor is 0 nothing is known at all: a trace of doubt keeps the matrix regular.
    least = np.array([1.0, 1.0, 1e-3])
    return np.diag(DOUBT * (np.maximum(x, least) / seconds) ** 2)


def _model(costs: Vector, information: Matrix, seen: int, errors: tuple[float, ...]) -> CostModel:
    fixed_s, s_per_byte, s_per_row = costs.tolist()
    return CostModel(fixed_s, s_per_byte, s_per_row, seen, tuple(information.ravel().tolist()), errors)


def _solve(information: Matrix, right: Vector) -> Vector:
    """`information⁻¹ · right`, scaled first: bytes and rows differ by many orders of magnitude.

    What rounding left of a direction that was never seen is kept from dividing by zero.
    """
    scale = 1.0 / np.sqrt(np.diag(information))
    scaled = information * np.outer(scale, scale) + REGULAR * np.eye(len(right))
    solved: Vector = scale * np.linalg.solve(scaled, scale * right)
    return solved


def _non_negative(costs: Vector, information: Matrix) -> Vector:
    """The non-negative costs nearest to `costs`, measured by `information`: of eight candidates the best feasible."""
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
