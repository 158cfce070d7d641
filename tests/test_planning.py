"""Planning: which texts share a batch, and which beginning they share in it."""

import itertools

import pytest

from qwen3core.planning import plan, shared_prefixes

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


def test_shared_prefixes_end_where_one_of_their_texts_does():
    a, b = (1, 2, 3), (9,)
    sequences = [[1, 2, 3, 4], [1, 2, 8], [1, 2], [9, 9], [7]]
    assert shared_prefixes(sequences[:2], [a, a]) == [(1, 2), (1, 2)]
    assert shared_prefixes(sequences, [a, a, a, b, b]) == [(1,), (1,), (1,), (), ()]
    assert shared_prefixes([[1, 2, 3]], [a]) == [(1, 2)]  # the last token is the text's own
    assert shared_prefixes([[5]], [()]) == [()]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=40),
    st.integers(1, 120),
    st.none() | st.integers(1, 6),
)
@settings(derandomize=True, deadline=None)
def test_plan_covers_all_within_budget(drawn, budget, most):
    """Lengths behind one of four prefixes, of 0 to 30 tokens."""
    prefixes = [tuple(range(10 * p)) for p, _ in drawn]
    lengths = [len(prefix) + own for prefix, (_, own) in zip(prefixes, drawn, strict=True)]
    groups = plan(lengths, budget, prefixes, most)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(lengths)))
    for group in groups:
        tokens = sum(lengths[i] - len(prefixes[i]) for i in group) + sum(map(len, {prefixes[i] for i in group}))
        assert tokens <= budget or len(group) == 1
        assert 0 < len(group) <= (most or len(lengths))
    assert [p for p, _ in itertools.groupby(prefixes[i] for i in order)] == list(dict.fromkeys(prefixes))
    assert all(a >= b for g in groups for a, b in itertools.pairwise(lengths[i] for i in g if not prefixes[i]))


def test_plan_gives_a_longer_sequence_its_own_batch():
    assert plan([], 1) == []
    assert plan([9000, 10], 8192) == [[0], [1]]
    assert plan([10, 4000, 4000], 8010) == [[1, 2, 0]]


def test_plan_bounds_the_sequences_of_a_batch():
    assert plan([5, 4, 3, 2, 1], 100, batch_size=2) == [[0, 1], [2, 3], [4]]
    assert plan([50, 4, 3], 10, batch_size=2) == [[0], [1, 2]]
