"""DeepSeek's published expert-parallel load balancer (EPLB), written from its description, as a baseline for tests.

Global policy of github.com/deepseek-ai/EPLB: redundant copies go one by one to the expert with the most load per copy.
Then the copies, heaviest first, go to the least loaded device with a free slot; all devices have the same number of slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def eplb_balancedness(load: Floats, devices: int, slots: int) -> float:
    """Returns mean over max device load, summed over layers, for load [L, E] on `devices` with `slots` experts per layer."""
    heaviest = sum(float(_device_loads(layer, devices, slots).max()) for layer in load)
    return float(load.sum() / devices / heaviest)


def _device_loads(load: Floats, devices: int, slots: int) -> Floats:
    copies = np.ones(len(load))
    for _ in range(devices * slots - len(load)):
        copies[np.argmax(load / copies)] += 1
    shares = np.repeat(load / copies, copies.astype(int))
    total, used = np.zeros(devices), np.zeros(devices, dtype=int)
    for share in np.sort(shares)[::-1]:
        device = np.argmin(np.where(used < slots, total, np.inf))
        total[device] += share
        used[device] += 1
    return total
