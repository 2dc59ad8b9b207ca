"""How fast routers are, learned from the requests they served. Frozen values: each observation returns a new one."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Weight of one request in a mean: the last 32 or so count, about one full batch of the default slots. That is enough to
# average out the noise of a step, and few enough to follow a change of load within one batch.
WEIGHT = 1 / 32
# Standard deviation of x, relative to its mean, at which the fitted slope counts as much as proportionality.
VARIED = 0.1


@dataclass(frozen=True, slots=True)
class Mean:
    """An exponentially weighted mean. The weights sum to 1 from the first value on, so the mean needs no start value."""

    value: float = 0.0
    weight: float = 0.0  # 0 = nothing seen, 1 = long settled

    def observe(self, value: float) -> Mean:
        weight = self.weight + WEIGHT * (1.0 - self.weight)
        return Mean(self.value + WEIGHT / weight * (value - self.value), weight)


@dataclass(frozen=True, slots=True)
class Line:
    """A line y(x) by exponentially weighted least squares, with non-negative slope and intercept.

    Until x has varied, y is assumed proportional to x. For a load x and a time y, this means that one worker does all
    the load.
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
        """The slope, limited to 0 … y / x, so that neither slope nor intercept is negative."""
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
    """How long the routers of one deployment take for a request; they are replicas, so one pace is learned for all.

    A router that is slower than the others still gets fewer requests: its requests stay longer, so its load is higher.
    """

    first_token: Line = Line()  # seconds to the first token, over the prompt tokens computed by then
    gap: Line = Line()  # seconds between two tokens of a stream, over the number of running streams
    stay: Mean = Mean()  # seconds for which a request keeps its slot
    output: Mean = Mean()  # tokens of a finished request
    found: Mean = Mean(1.0, weight=1.0)  # fraction of the predicted cached tokens that was in the cache; starts at 1

    @property
    def known(self) -> bool:
        """Whether at least one request has been observed from its first token to its end."""
        return self.stay.weight > 0.0 and self.first_token.y.weight > 0.0

    def started(self, tokens: float, seconds: float) -> Pace:
        """Observes a request's first token, `seconds` after the request was sent. Not for requests that waited for a slot.

        `tokens`: prompt tokens that the router computed by then, including those of the requests ahead.
        """
        return replace(self, first_token=self.first_token.observe(tokens, seconds))

    def looked_up(self, share: float) -> Pace:
        """Observes that a router had cached the fraction `share`, 0 to 1, of the tokens predicted to be in its cache."""
        return replace(self, found=self.found.observe(share))

    def ended(self, stay: float, streams: float, tokens: int, streaming: float) -> Pace:
        """Observes a finished request: `stay` seconds in its slot, `streaming` of them between its first and last token."""
        gap = self.gap.observe(streams, streaming / (tokens - 1)) if tokens > 1 else self.gap
        return replace(self, stay=self.stay.observe(stay), output=self.output.observe(tokens), gap=gap)

    def slot_wait(self, load: float, slots: int) -> float:
        """Returns the seconds until a request gets one of a router's `slots` if `load` other requests are at that router."""
        return max(load + 1 - slots, 0.0) * self.stay.value / slots if slots else 0.0
