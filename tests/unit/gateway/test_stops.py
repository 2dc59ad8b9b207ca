"""Stop strings: the text before the first that is completed, however it was cut into pieces, and nothing taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.gateway.stops import StopStrings

TEXT = st.text("abc🙂", max_size=40)
STOPS = st.lists(st.text("abc🙂", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """What comes before the stop string that is completed first; of several, the longest."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


@given(text=TEXT, stops=STOPS, sizes=st.lists(st.integers(1, 6), max_size=40))
def test_any_cut_gives_what_the_whole_text_gives(text: str, stops: list[str], sizes: list[int]):
    """As the naive twin finds it in the whole text; each piece may be sent at once and is never retracted."""
    expected, stopped = naive(text, stops)
    stop_strings, sent, start = StopStrings(stops), "", 0
    for size in [*sizes, *[1] * len(text)]:
        end = min(start + size, len(text))
        sent += stop_strings.push(text[start:end], last=end == len(text))
        assert expected.startswith(sent)
        if stop_strings.stopped or end == len(text):
            break
        start = end
    assert (sent, stop_strings.stopped) == (expected, stopped)


def test_only_what_may_become_a_stop_string_is_held_back():
    """Everything else is sent at once."""
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(piece) for piece in ("one E", "Nd", " two\n", "three\n", "\nfour")] == [
        "one ",
        "ENd",
        " two",
        "\nthree",
        "",
    ]
    assert stops.stopped


@pytest.mark.parametrize("stops", [[], ["zzz"]])
def test_without_a_match_all_text_passes(stops: list[str]):
    """Nothing is lost at the end, half a stop string included."""
    stop_strings = StopStrings(stops)
    assert stop_strings.push("text z") + stop_strings.push("z", last=True) == "text zz"
    assert not stop_strings.stopped
