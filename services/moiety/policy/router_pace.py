"""How fast routers are, learned from the requests they served. Frozen values: each observation gives the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace

# What one request weighs in a mean: the last thirty or so count, about one full batch of the default slots. That is
# enough to average out a step's noise, and few enough to follow a change of load within one batch.
WEIGHT = 1 / 32
# How much x must have varied, relative to its mean, before what was seen outweighs the assumption of proportion.
VARIED = 0.1


@dataclass(frozen=True, slots=True)
class Mean:
    """An exponentially weighted mean, exact from the first value on."""

    value: float = 0.0
    weight: float = 0.0  # 0 = nothing seen, 1 = long settled

    def observe(self, value: float) -> Mean:
        weight = self.weight + WEIGHT * (1.0 - self.weight)
        return Mean(self.value + WEIGHT / weight * (value - self.value), weight)


@dataclass(frozen=True, slots=True)
class Line:
    """y over x by exponentially weighted least squares, for quantities that grow with x from a cost of 0 or more.

    Until x has varied, y is assumed to be proportional to x: for a time over a load, that everybody shares one worker.
    """

    x: Mean = Mean()
    y: Mean = Mean()
    variance: float = 0.0  # of x
    covariance: float = 0.0

    def observe(self, x: float, y: float) -> Line:
        xs, ys = self.x.observe(x), self.y.observe(y)
        gain = WEIGHT / xs.weight
        dx, dy = x - self.x.value, y - self.y.value
        variance = (1.0 - gain) * (self.variance + gain * dx * dx)
        covariance = (1.0 - gain) * (self.covariance + gain * dx * dy)
        return Line(xs, ys, variance, covariance)

    @property
    def slope(self) -> float:
        """From 0 to proportion, so that neither slope nor intercept is negative."""
        if self.x.value <= 0.0:
            return 0.0
        proportion = self.y.value / self.x.value
        doubt = (VARIED * self.x.value) ** 2
        return min(max((self.covariance + doubt * proportion) / (self.variance + doubt), 0.0), proportion)

    @property
    def intercept(self) -> float:
        return max(self.y.value - self.slope * self.x.value, 0.0)

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


@dataclass(frozen=True, slots=True)
class Pace:
    """What routers of one deployment take for a request; they are replicas of each other, so one pace is learned for all.

    A router that is slower than the others is still found out: its requests stay, and its load is what others see.
    """

    first_token: Line = Line()  # seconds to the first token, over the prompt tokens to be computed by then
    gap: Line = Line()  # seconds between two tokens of a stream, over the streams that run
    stay: Mean = Mean()  # seconds for which a request keeps its slot
    output: Mean = Mean()  # tokens of a finished request
    found: Mean = Mean(1.0, weight=1.0)  # of the cached tokens predicted, the part that was there; all, to begin with

    @property
    def known(self) -> bool:
        """Whether a request has been seen from its first token to its end."""
        return self.stay.weight > 0.0 and self.first_token.y.weight > 0.0

    def started(self, tokens: float, seconds: float) -> Pace:
        """A first token came `seconds` after the request was sent; no slot was waited for, `tokens` were computed."""
        return replace(self, first_token=self.first_token.observe(tokens, seconds))

    def looked_up(self, share: float) -> Pace:
        """A router had `share` of the tokens that were predicted to be in its cache, 0 to 1."""
        return replace(self, found=self.found.observe(share))

    def ended(self, stay: float, streams: float, tokens: int, streaming: float) -> Pace:
        """A request is done: `stay` seconds in its slot, `streaming` of them from the first of `tokens` to the last."""
        gap = self.gap.observe(streams, streaming / (tokens - 1)) if tokens > 1 else self.gap
        return replace(self, stay=self.stay.observe(stay), output=self.output.observe(tokens), gap=gap)

    def slot_wait(self, load: float, slots: int) -> float:
        """Seconds until a request that finds `load` others at a router of `slots` has a slot."""
        return max(load + 1 - slots, 0.0) * self.stay.value / slots if slots else 0.0
