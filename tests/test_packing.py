"""Every row's path through the forest spells exactly that row, and nothing else is computed."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpost.packing import MIN_SHARED_TOKENS, PackPlan, UnpackableBatchError, pack


def parents(segments: torch.Tensor) -> list[int]:
    """Brute force: the parent is the tightest earlier segment whose subtree covers this one."""
    spans = segments.tolist()
    result = []
    for i, (start, _, subtree_end) in enumerate(spans):
        covering = [j for j in range(i) if spans[j][1] <= start and subtree_end <= spans[j][2]]
        result.append(covering[-1] if covering else -1)
    return result


def path_of(plan: PackPlan, token: int) -> list[int]:
    """Unique tokens that `token` attends to, in order."""
    spans, up = plan.segments.tolist(), parents(plan.segments)
    segment = next(i for i, (start, end, _) in enumerate(spans) if start <= token < end)
    path = list(range(spans[segment][0], token + 1))
    while (segment := up[segment]) >= 0:
        path = list(range(*spans[segment][:2])) + path
    return path


def assert_paths_spell_rows(plan: PackPlan, rows: list[tuple[list[int], list[int]]]) -> None:
    """`rows`: per sequence, its ids and the flat places of the batch they stand at."""
    index = plan.token_index.reshape(-1)
    placed = 0
    for ids, places in rows:
        present = [place for place in places if index[place] >= 0]
        assert present == places[: len(present)]
        placed += len(present)
        for i, place in enumerate(present):
            path = path_of(plan, int(index[place]))
            assert plan.input_ids[path].tolist() == ids[: i + 1]
            assert plan.position_ids[path].tolist() == list(range(i + 1))
    assert placed == int((index >= 0).sum())
    assert set(index[index >= 0].tolist()) == set(range(plan.num_unique_tokens))


def assert_segments_tile(plan: PackPlan) -> None:
    starts, ends, subtrees = plan.segments.unbind(1)
    bounds = [0, *ends.tolist()]
    assert bounds[:-1] == starts.tolist() and bounds[-1] == plan.num_unique_tokens
    assert (ends > starts).all() and (subtrees >= ends).all()


@st.composite
def ragged_rows(draw: st.DrawFn) -> list[list[int]]:
    """Rows grown from a pool of common beginnings, so that forests get several levels deep."""
    pool = [[]]
    for _ in range(draw(st.integers(1, 4))):
        base = draw(st.sampled_from(pool))
        pool.append(base + draw(st.lists(st.integers(0, 2), min_size=1, max_size=24)))
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        rows.append(
            draw(st.sampled_from(pool)) + draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        )
    return rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=ragged_rows(), left=st.booleans(), share=st.booleans(), data=st.data())
def test_padded_batch(rows, left, share, data) -> None:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    expected, kept = [], 0
    for b, row in enumerate(rows):
        begin = width - len(row) if left else 0
        ids[b, begin : begin + len(row)] = torch.tensor(row)
        mask[b, begin : begin + len(row)] = 1
        needed = data.draw(st.integers(0, len(row)))
        if needed:
            scored[b, begin + needed - 1] = True
        kept += needed
        expected.append((row, [b * width + begin + i for i in range(len(row))]))
    plan = pack(ids, mask, scored=scored, share=share)
    assert_segments_tile(plan)
    assert_paths_spell_rows(plan, expected)
    assert int((plan.token_index >= 0).sum()) == kept
    assert plan.num_row_tokens == sum(map(len, rows)) and plan.num_rows == len(rows)
    if not share:
        assert plan.num_unique_tokens == kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=ragged_rows())
def test_packed_row_equals_padded_batch(rows) -> None:
    flat = torch.tensor([list(chain.from_iterable(rows))])
    positions = torch.tensor([list(chain.from_iterable(range(len(row)) for row in rows))])
    plan = pack(flat, position_ids=positions)
    at, expected = 0, []
    for row in rows:
        expected.append((row, list(range(at, at + len(row)))))
        at += len(row)
    assert_paths_spell_rows(plan, expected)
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    other = pack(padded, mask)
    assert torch.equal(plan.input_ids, other.input_ids)
    assert torch.equal(plan.segments, other.segments)


def test_no_longer_prefix_could_be_shared() -> None:
    """Two rows share every token up to the first that differs."""
    prompt = list(range(100, 120))
    rows = [prompt + [1, 2, 3], prompt + [1, 2, 4], prompt + [5]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    plan = pack(ids, mask)
    # The prompt once; `1, 2` is below the least length worth sharing.
    assert plan.num_unique_tokens == len(prompt) + 3 + 3 + 1
    assert MIN_SHARED_TOKENS > 2


def test_levels_nest() -> None:
    system, first, second = list(range(10)), list(range(20, 32)), list(range(40, 55))
    rows = [
        system + first + [1],
        system + first + [2],
        system + second + [1],
        system + second + [2],
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    plan = pack(ids, mask)
    assert plan.num_unique_tokens == 10 + 12 + 2 + 15 + 2
    assert sorted(set(parents(plan.segments))) == [-1, 0, 1, 4]


def test_equal_ids_at_other_positions_are_not_shared() -> None:
    row = list(range(30))
    ids = torch.tensor([row, row])
    positions = torch.stack([torch.arange(30), torch.arange(5, 35)])
    plan = pack(ids, position_ids=positions)
    assert plan.num_unique_tokens == 60
    assert sorted(plan.position_ids.tolist()) == sorted([*range(30), *range(5, 35)])


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5)])
def test_smallest_batches(shape) -> None:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape)
    plan = pack(ids)
    assert plan.num_unique_tokens == ids.numel()
    assert torch.equal(plan.input_ids[plan.token_index], ids)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches_give_an_empty_plan(shape) -> None:
    plan = pack(torch.zeros(shape, dtype=torch.int64))
    assert plan.num_unique_tokens == 0 and plan.segments.shape == (0, 3)
    assert plan.token_index.shape == shape


def test_row_without_tokens_is_left_out() -> None:
    plan = pack(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 0], [1, 1]]))
    assert plan.num_rows == 1 and plan.token_index.tolist() == [[-1, -1], [0, 1]]


def test_hole_in_the_mask_is_named() -> None:
    with pytest.raises(UnpackableBatchError, match="row 1 has a hole"):
        pack(torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]))


def test_jumping_positions_are_named() -> None:
    with pytest.raises(UnpackableBatchError, match="row 0 jump"):
        pack(torch.ones(1, 4, dtype=torch.int64), position_ids=torch.tensor([[0, 1, 3, 4]]))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have the shape"):
        pack(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        pack(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        pack(torch.ones(2, 4))
