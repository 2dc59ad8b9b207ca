"""The waiting queue against a plain list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_support import sequence

from moiety.router.schedule.waiting import WaitingQueue


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "back", "pop", "remove"]), st.integers(0, 2), st.sampled_from("xyz")),
        max_size=40,
    )
)
@settings(deadline=None)
def test_the_queue_loses_no_sequence(actions: list[tuple[str, int, str]]):
    """Like a plain list, it keeps priorities and each tenant's order, with preempted sequences in front."""
    queue, twin = WaitingQueue(), []
    for number, (action, priority, tenant) in enumerate(actions):
        one = sequence(str(number), priority=priority, tenant=tenant)
        if action == "push":
            queue.push(one)
            twin.append(one)
        elif action == "back":
            queue.push_front(one)
            twin.insert(0, one)
            if priority == min(other.priority for other in twin):
                assert queue.first() is one
        elif twin and action == "pop":
            first = queue.first()
            assert queue.pop() is first
            assert first.priority == min(other.priority for other in twin)
            same_tenant = [other for other in twin if (other.priority, other.tenant) == (first.priority, first.tenant)]
            assert first is same_tenant[0]
            twin.remove(first)
        elif twin:
            gone = twin.pop(number % len(twin))
            assert queue.remove(gone)
            assert not queue.remove(gone)
        assert len(queue) == len(twin)
        assert set(queue) == set(twin)
    assert queue.first() is None or twin
