"""Measures how long a function takes on a device, and how fast that device multiplies and copies at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

# Bytes written before each run: more than an L2 cache holds, so that weights come from memory as in a model.
FLUSH = 256 << 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates measured on one device. The benchmark's percentages are shares of these, not of a data sheet's."""

    matmul: float  # FLOP/s of a large product
    copy: float  # bytes/s, read plus written


class Clock:
    """Times functions on `device`; on CUDA as a captured graph where possible, which keeps launch overhead small."""

    def __init__(self, device: str, repeats: int = 20):
        self.device, self._repeats = device, repeats
        self._cuda = device.startswith("cuda")
        self.name = torch.cuda.get_device_name(device) if self._cuda else "Triton's interpreter"
        self._spare = torch.empty(FLUSH if self._cuda else 1, dtype=torch.int8, device=device)

    def seconds(self, function: Callable[[], object]) -> tuple[float, bool]:
        """Returns the median seconds of one run of `function`, and whether it ran as a CUDA graph."""
        if not self._cuda:
            function()
            return median(self._on_cpu(function) for _ in range(3)), False
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        run, captured = self._captured(function)
        times = []
        for _ in range(self._repeats):
            self._spare.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return median(times), captured

    @staticmethod
    def _captured(function: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """Returns the replay of a CUDA graph of `function` and True, or `function` and False where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except Exception:
            torch.cuda.synchronize()
            return function, False
        return graph.replay, True

    @staticmethod
    def _on_cpu(function: Callable[[], object]) -> float:
        """Returns how many seconds one run of `function` takes on the CPU."""
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Measures the device's best rates: the faster of two large products in `dtype`, and a copy of 1 GiB (less on CPU)."""
        sizes, elements = ((8192, 16384), 1 << 29) if self._cuda else ((64,), 1 << 16)
        rates = []
        for size in sizes:
            a, b = (torch.randn(size, size, dtype=dtype, device=self.device) for _ in range(2))
            rates.append(2 * size**3 / self.seconds(lambda a=a, b=b: a @ b)[0])  # type: ignore[misc]
        source = torch.zeros(elements, dtype=torch.int16, device=self.device)
        target = torch.empty_like(source)
        return Ceilings(max(rates), 2 * source.nbytes / self.seconds(lambda: target.copy_(source))[0])
