"""The tokens that every test of the running system compares with."""

from __future__ import annotations

import pytest
from chaos_support import NEW_TOKENS

from support.serving import Served
from support.streams import Streams


@pytest.fixture(scope="package")
def expected(served: Served) -> list[list[int]]:
    """Returns the tokens of a run without faults or changes."""
    return served.run(lambda client: Streams(client, NEW_TOKENS).finish())
