"""The nucleus found by mass against the definition, which sorts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.sampling import reference
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.nucleus import find_nucleus
from xllm.worker.sampling.rows import SampleRow

# Multiples of 1/4, so that ties abound, and some that nothing may draw.
LOGITS = st.lists(
    st.one_of(st.integers(-240, 24).map(lambda q: q / 4), st.just(-float("inf"))),
    min_size=1,
    max_size=120,
).filter(lambda logits: max(logits) > -float("inf"))


@given(
    logits=LOGITS,
    temperature=st.sampled_from([1e-20, 0.25, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-12, 0.01, 0.3, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_it_keeps_what_a_sort_would_keep(logits, temperature, top_p, min_p) -> None:
    kept = []
    for factor in (1.0, 1 - 1e-9, 1 + 1e-9):  # masses that equal p to the last digits
        params = SamplingParams(temperature=temperature, top_p=top_p * factor, min_p=min_p)
        row = SampleRow(params, 0, 0, (), ())
        kept.append(sorted(reference.kept_tokens(logits, row)))
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p)
    found = find_nucleus(torch.tensor(logits), max(logits), params)
    assert found.ids[0].tolist() in kept
    assert found.keep.all()
    assert found.clear.all()
    assert torch.equal(
        found.tempered[0], (torch.tensor(logits).double()[found.ids[0]] - max(logits)) / temperature
    )


def test_a_flat_row_is_cut_among_equals_by_id() -> None:
    params = SamplingParams(top_p=0.25)
    found = find_nucleus(torch.zeros(20_000), 0.0, params)
    assert found.ids[0].tolist() == list(range(5000))
