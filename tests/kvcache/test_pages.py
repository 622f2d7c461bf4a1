"""The page pool: every page is free or one owner's, and free ones are handed out together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import InvariantError
from xllm.kvcache.pages import NO_OWNER, PagePool

STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-1, 49), st.integers(-1, 49)), max_size=120
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 50), STEPS)
def test_any_history(num_pages: int, steps: list[tuple[int, int, int]]) -> None:
    pool = PagePool(num_pages)
    owned: dict[int, int] = {}
    for owner, wanted, after in steps:
        wanted, after = min(wanted, num_pages - 1), min(after, num_pages - 1)
        if owner == 3 or not pool.num_free:
            if owned:
                page = sorted(owned)[wanted % len(owned)]
                del owned[page]
                pool.put(page)
        else:
            page = pool.take(owner, wanted, after)
            assert page not in owned
            if wanted >= 0 and wanted not in owned:
                assert page == wanted
            elif after >= 0 and after + 1 < num_pages and after + 1 not in owned:
                assert page == after + 1
            owned[page] = owner
        pool.check()
        assert pool.num_free == num_pages - len(owned)
        assert all(pool.owner(p) == owned.get(p, NO_OWNER) for p in range(num_pages))


def test_runs_begin_where_they_can_grow() -> None:
    pool = PagePool(64)
    ends = [pool.take(0) for _ in range(4)]
    assert ends == [0, 16, 32, 48]
    for _ in range(15):
        ends = [pool.take(0, after=end) for end in ends]
    assert ends == [15, 31, 47, 63]
    assert pool.statistics().num_free == pool.statistics().num_whole_groups == 0


def test_misuse_is_an_invariant_error() -> None:
    pool = PagePool(3)
    page = pool.take(2)
    pool.put(page)
    with pytest.raises(InvariantError, match=f"page {page} was given back twice"):
        pool.put(page)
    pool._owner[1] = 0
    with pytest.raises(InvariantError, match="pages free"):
        pool.check()
