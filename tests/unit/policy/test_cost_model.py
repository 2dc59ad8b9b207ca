"""The cost model finds the costs behind noisy replies, follows changes, and keeps what new samples do not contradict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moiety.policy.cost_model import KernelCost, Sample, expert_load, fit, update

EXPERT = 44e6  # bytes of one DeepSeek-V3 expert in fp8
TRUE = (30e-6, 0.4e-12, 0.25e-6)


def batches(count: int, seed: int, costs: tuple[float, float, float] = TRUE, noise: float = 0.0) -> list[Sample]:
    """Returns decode and prefill batches of 1 to 16 experts; their time is `costs` with lognormal noise of median 1."""
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        experts = random.integers(1, 17)
        rows = experts * (random.integers(100, 400) if random.random() < 0.2 else random.integers(1, 16))
        seconds = costs[0] + costs[1] * experts * EXPERT + costs[2] * rows
        samples.append(Sample(experts * EXPERT, float(rows), seconds * float(np.exp(noise * random.standard_normal()))))
    return samples


def test_exact_replies_give_the_exact_costs() -> None:
    """Without noise, the fit finds the three costs to within 1 %."""
    model = fit(batches(200, seed=1))
    assert (model.fixed_s, model.s_per_byte, model.s_per_row) == pytest.approx(TRUE, rel=1e-2)
    assert model.error is not None
    assert model.error < 1e-3


def test_noise_and_outliers_leave_the_fit_near() -> None:
    """With 20 % noise and every fiftieth reply 20 times too long, predictions stay within 8 % of the truth."""
    samples = batches(3000, seed=2, noise=0.2)
    samples = [Sample(s.weight_bytes, s.rows, s.seconds * (20 if i % 50 == 49 else 1)) for i, s in enumerate(samples)]
    model = fit(samples)
    for clean in batches(50, seed=3):
        assert model.predict(clean.weight_bytes, clean.rows) == pytest.approx(clean.seconds, rel=0.08)
    assert model.error is not None
    assert 0.05 < model.error < 0.25, "the error reflects the noise"


def test_a_device_that_changes_is_followed() -> None:
    """After the memory bandwidth halves, 1500 replies move the predictions to within 10 % of the new times."""
    model = fit(batches(500, seed=4, noise=0.05))
    slower = (TRUE[0], 2 * TRUE[1], TRUE[2])
    model = fit(batches(1500, seed=5, costs=slower, noise=0.05), model)
    for clean in batches(50, seed=6, costs=slower):
        assert model.predict(clean.weight_bytes, clean.rows) == pytest.approx(clean.seconds, rel=0.1)


def test_costs_without_new_samples_are_not_forgotten() -> None:
    """Twenty thousand equal decode batches do not erase the cost of rows that prefill taught."""
    model = fit(batches(500, seed=7))
    alike = Sample(8 * EXPERT, 8.0, TRUE[0] + TRUE[1] * 8 * EXPERT + TRUE[2] * 8.0)
    for _ in range(20_000):
        model = update(model, alike)
    assert model.s_per_row == pytest.approx(TRUE[2], rel=0.02)
    assert model.predict(EXPERT, 1000.0) == pytest.approx(TRUE[0] + TRUE[1] * EXPERT + 1000 * TRUE[2], rel=0.02)


def test_a_seed_holds_until_it_is_contradicted() -> None:
    """Equal replies move a seeded model only as far as they contradict it; varied replies correct it."""
    seed = KernelCost.seeded(TRUE[0], TRUE[1], 3 * TRUE[2])
    decode = fit([Sample(8 * EXPERT, 8.0, TRUE[0] + TRUE[1] * 8 * EXPERT + TRUE[2] * 8.0)] * 100, seed)
    assert decode.s_per_row == pytest.approx(3 * TRUE[2], rel=0.1), (
        "8 rows with 8 experts do not determine the cost of rows"
    )
    assert fit(batches(300, seed=8), seed).s_per_row == pytest.approx(TRUE[2], rel=0.05)


def test_busy_and_the_fixed_share_follow_from_the_costs() -> None:
    """Busy is rates times predicted times; the fixed share is fixed over total time."""
    model = KernelCost.seeded(*TRUE)
    assert model.fixed_share(EXPERT, 40.0) == pytest.approx(TRUE[0] / model.predict(EXPERT, 40.0))
    assert model.busy(10.0, 10 * EXPERT, 10 * 40.0) == pytest.approx(10 * model.predict(EXPERT, 40.0))


def test_expert_load_counts_activations_in_decode_and_rows_in_prefill() -> None:
    """With equal rows, the expert in more batches has more load in decode; in prefill the loads are nearly equal."""
    model = KernelCost.seeded(*TRUE)
    decode = expert_load(model, [[1000.0, 1000.0]], [[1000.0, 250.0]], EXPERT)
    prefill = expert_load(model, [[1e6, 1e6]], [[1000.0, 250.0]], EXPERT)
    assert decode[0, 0] > 3 * decode[0, 1]
    assert prefill[0, 0] < 1.1 * prefill[0, 1]


samples = st.builds(
    Sample,
    weight_bytes=st.floats(0, 1e12),
    rows=st.floats(0, 1e6),
    seconds=st.floats(1e-7, 1e3),
)
broken = st.builds(
    Sample,
    weight_bytes=st.sampled_from([-1.0, float("nan"), 1e6]),
    rows=st.sampled_from([-1.0, float("inf")]),
    seconds=st.sampled_from([0.0, -1.0, float("nan"), 1.0]),
)


@settings(deadline=None)
@given(st.lists(samples | broken, max_size=40))
@example([Sample(0.0, 0.0, 294.0), Sample(127.0, 1.0, 0.0078125)])  # rounding made this matrix singular
def test_costs_stay_finite_and_non_negative(replies: list[Sample]) -> None:
    """No sequence of valid and invalid replies makes a cost negative, infinite or nan."""
    model = fit(replies)
    costs = np.array([model.fixed_s, model.s_per_byte, model.s_per_row])
    assert np.isfinite(costs).all()
    assert costs.min() >= 0
