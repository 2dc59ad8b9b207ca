"""The choice of a router as a pure function: a cached prefix wins until the wait for it costs more than it saves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moiety.policy.router_choice import Candidate, choose
from moiety.policy.router_pace import Line, Mean, Pace

PROMPT, OUTPUT = 1000, 20
candidates = st.lists(
    st.builds(
        Candidate,
        load=st.integers(0, 100),
        slots=st.integers(0, 32),
        pending_prompt_tokens=st.floats(0, 5000),
        cached=st.floats(0, PROMPT),
    ),
    min_size=1,
    max_size=20,
)
draws = st.integers(0, 2**32 - 1)


def learned() -> Pace:
    """A pace of 1000 prompt tokens per second, 10 ms per token plus 1 ms per running stream, and one second in a slot."""
    pace = Pace()
    for tokens, streams in [(100, 1), (1000, 4), (500, 8), (2000, 2)] * 40:
        pace = pace.started(tokens, tokens / 1000)
        pace = pace.ended(1.0, streams, OUTPUT, (OUTPUT - 1) * (0.010 + 0.001 * streams))
    return pace


PACE = learned()


def test_the_pace_is_learned_from_requests():
    """Slopes and intercepts are those of the requests; the wait for a slot follows from how long requests stay."""
    assert abs(PACE.first_token.at(3000) - 3.0) < 0.02
    assert abs(PACE.gap.at(1) - 0.011) < 0.0005
    assert abs(PACE.gap.at(20) - 0.030) < 0.001
    assert abs(PACE.slot_wait(load=11, slots=4) - 2.0) < 1e-9
    assert PACE.slot_wait(load=3, slots=4) == 0.0


@given(seen=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e3)), max_size=50), x=st.integers(0, 10**6))
def test_no_prediction_is_negative(seen: list[tuple[int, float]], x: int):
    """Neither slope nor value falls below 0 after any observations."""
    line = Line()
    for at, value in seen:
        line = line.observe(at, value)
    assert line.slope >= 0.0
    assert line.at(x) >= 0.0


def test_until_load_has_varied_time_is_assumed_proportional():
    """After observations at a single load, twice the load is predicted to take twice the time."""
    line = Line()
    for _ in range(10):
        line = line.observe(4.0, 0.020)
    assert abs(line.at(8.0) - 0.040) < 1e-9


def test_a_mean_is_exact_from_the_first_value():
    """The initial value has no weight in a mean of observations."""
    assert Mean(1.0).observe(5.0).value == 5.0
    assert abs(Mean().observe(1.0).observe(3.0).value - 2.0) < 0.05


@given(routers=candidates, draw=draws, known=st.booleans())
def test_the_choice_is_valid_and_never_worse_than_the_longest_prefix(routers: list[Candidate], draw: int, known: bool):
    """Any draw gives a candidate and a reason; with a pace, the sole longest prefix is not better in every respect."""
    chosen = choose(routers, PACE if known else Pace(), PROMPT, OUTPUT, draw)
    assert 0 <= chosen.index < len(routers)
    assert chosen.reason
    winner = routers[chosen.index]
    if known:
        for other in routers:
            better = (
                other.cached > winner.cached
                and other.pending_prompt_tokens < winner.pending_prompt_tokens
                and other.slots == winner.slots
            )
            sole = sum(router.cached == other.cached for router in routers) == 1
            longest = other.cached == max(router.cached for router in routers)
            assert not (better and sole and longest and other.load < winner.load)


def test_the_longest_prefix_is_worth_what_it_saves():
    """900 cached tokens save 0.9 s for this request and for the next: only a longer wait than 1.8 s outweighs that."""
    holder, idle = Candidate(load=8, slots=16, cached=900), Candidate(load=0, slots=16)
    chosen = choose([idle, holder], PACE, PROMPT, OUTPUT, draw=0)
    assert (chosen.index, chosen.reason) == (1, "900 tokens cached, 8 requests there")
    assert choose([idle, holder._replace(pending_prompt_tokens=1500.0)], PACE, PROMPT, OUTPUT, draw=0).index == 1
    for busy in (holder._replace(load=50), holder._replace(pending_prompt_tokens=1900.0)):
        chosen = choose([idle, busy], PACE, PROMPT, OUTPUT, draw=0)
        assert chosen.index == 0
        assert chosen.reason == "900 tokens cached elsewhere are not worth the wait, 0 requests there"


def test_the_longest_prefix_is_always_compared():
    """Among many routers, every draw finds the one that has the prompt cached."""
    routers = [Candidate(load=1, slots=16) for _ in range(40)]
    routers[17] = Candidate(load=1, slots=16, cached=900)
    assert {choose(routers, PACE, PROMPT, OUTPUT, draw).index for draw in range(0, 2**32, 2**32 // 97)} == {17}


def test_without_a_pace_the_least_loaded_is_chosen():
    """Without a pace, load decides, and on a tie the cached prefix."""
    routers = [Candidate(load=2, slots=4, cached=900), Candidate(load=1, slots=4)]
    assert choose(routers, Pace(), PROMPT, OUTPUT, draw=3).index == 1
    equal = [Candidate(load=1, slots=4), Candidate(load=1, slots=4, cached=16)]
    assert {choose(equal, Pace(), PROMPT, OUTPUT, draw).index for draw in range(8)} == {1}


def test_gateways_with_equal_knowledge_spread_their_choices():
    """The draw chooses equal routers about equally often."""
    routers = [Candidate(load=3, slots=16) for _ in range(8)]
    chosen = [choose(routers, PACE, PROMPT, OUTPUT, draw * 2654435761 % 2**32).index for draw in range(4000)]
    assert all(400 <= chosen.count(index) <= 600 for index in range(8))
