"""Copies of parameters at one step, and a start that is read back as it was written."""

import pytest
import torch
from torch import Tensor, nn

from dynamics.recording.snapshots import Snapshot, factors_of, keys_of, scaled_products, start_snapshot, start_tensors
from probes.watched import AdapterProduct, Dense, Watched


def product(seed: int, scale: float = 2.0) -> AdapterProduct:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(5, 2, generator=generator), torch.randn(2, 4, generator=generator)
    return AdapterProduct(nn.Parameter(left), nn.Parameter(right), lambda: scale)


@pytest.fixture
def pair() -> Watched:
    return Watched("sum", (product(0), product(1, scale=3.0)))


@pytest.fixture
def weight() -> Watched:
    return Watched("weight", Dense(nn.Parameter(torch.arange(6.0).reshape(2, 3))))


def snapshot_of(*matrices: Watched) -> Snapshot:
    values = {id(parameter): parameter.detach().clone() for matrix in matrices for parameter in matrix.sources}
    scales = {factors_of(term): scale for matrix in matrices for term, scale in scaled_products(matrix)}
    return Snapshot(values, scales)


def dense(matrix: Watched, snapshot: Snapshot) -> Tensor:
    value = snapshot.read(matrix)
    return value if isinstance(value, Tensor) else value.to_dense()


def home(parameter: nn.Parameter) -> torch.device:
    return torch.device("cpu")


def test_a_snapshot_keeps_the_matrix_while_its_parameters_change(pair, weight):
    snapshot = snapshot_of(pair, weight)
    before = [dense(matrix, snapshot) for matrix in (pair, weight)]
    for parameter in (*pair.sources, *weight.sources):
        parameter.data.mul_(2)
    for matrix, value in zip((pair, weight), before, strict=True):
        torch.testing.assert_close(dense(matrix, snapshot), value, rtol=0, atol=0)


def test_a_part_has_the_adapters_whose_copies_are_there(pair, weight):
    assert isinstance(pair.terms, tuple)
    snapshot = snapshot_of(pair)
    assert snapshot.part(weight) is None
    for parameter in pair.terms[1].parameters:
        del snapshot.values[id(parameter)]
    part = snapshot.part(pair)
    assert part is not None
    assert part.terms == pair.terms[:1]
    assert Snapshot().part(pair) is None


def test_a_start_is_read_back_as_it_was_written(pair, weight):
    watched = [pair, weight]
    start, keys = snapshot_of(*watched), keys_of(watched)
    again = start_snapshot(start_tensors(start, watched, keys), 0, watched, keys, home)
    for matrix in watched:
        torch.testing.assert_close(dense(matrix, again), dense(matrix, start), rtol=0, atol=0)


def test_a_shared_parameter_has_one_key(weight):
    twin = Watched("twin", weight.terms)
    assert list(keys_of([weight, twin]).values()) == ["weight#0"]


def test_the_start_of_a_later_step_counts_from_that_step_on(weight):
    keys = keys_of([weight])
    first = start_tensors(snapshot_of(weight), [weight], keys)
    weight.sources[0].data.fill_(7)
    tensors = {**first, **start_tensors(snapshot_of(weight), [weight], keys, step=5)}
    for step, value in ((4, torch.arange(6.0).reshape(2, 3)), (5, torch.full((2, 3), 7.0))):
        torch.testing.assert_close(dense(weight, start_snapshot(tensors, step, [weight], keys, home)), value)


def test_a_product_that_was_zero_at_a_later_step_has_no_copy(pair):
    keys, zero = keys_of([pair]), Snapshot()
    tensors = start_tensors(zero, [pair], keys, step=3)
    assert set(tensors) == {*(f"{key}~3" for key in keys.values()), "sum#scales~3"}
    assert start_snapshot(tensors, 3, [pair], keys, home).values == {}
    assert start_tensors(zero, [pair], keys) == {}
