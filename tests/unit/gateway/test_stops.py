"""Stop strings: text passes up to the first completed one, for any cut into pieces, and no sent text is retracted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.gateway.text.stops import StopStrings

TEXT = st.text("abc🙂", max_size=40)
STOPS = st.lists(st.text("abc🙂", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Returns the text before the stop string that is completed first (the longest of several), and that stop string."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=TEXT, stops=STOPS, sizes=st.lists(st.integers(1, 6), max_size=40))
def test_any_cut_gives_what_the_whole_text_gives(text: str, stops: list[str], sizes: list[int]):
    """For any cut the output is that of the naive twin on the whole text, and sent text is never retracted."""
    expected, matched = naive(text, stops)
    stop_strings, sent, start = StopStrings(stops), "", 0
    for size in [*sizes, *[1] * len(text)]:
        end = min(start + size, len(text))
        sent += stop_strings.push(text[start:end], last=end == len(text))
        assert expected.startswith(sent)
        if stop_strings.matched or end == len(text):
            break
        start = end
    assert (sent, stop_strings.matched) == (expected, matched)


def test_only_what_may_become_a_stop_string_is_held_back():
    """Text that cannot become a stop string is returned at once."""
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(piece) for piece in ("one E", "Nd", " two\n", "three\n", "\nfour")] == [
        "one ",
        "ENd",
        " two",
        "\nthree",
        "",
    ]
    assert stops.matched == "\n\n"


@pytest.mark.parametrize("stops", [[], ["zzz"]])
def test_without_a_match_all_text_passes(stops: list[str]):
    """Without a match all text is returned, including a part of a stop string at the end."""
    stop_strings = StopStrings(stops)
    assert stop_strings.push("text z") + stop_strings.push("z", last=True) == "text zz"
    assert stop_strings.matched is None
