"""Spectra of live parameters are those of the matrices multiplied out and subtracted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dynamics.recording.live import LiveSpectra, Snapshot
from dynamics.spectra import walk
from dynamics.spectra.walk import MatrixSpectra
from probes.low_rank import LowRankMatrix
from probes.watched import AdapterProduct, Dense, Watched


def parameter(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def lora(name: str = "lora", *, seed: int = 0, zero: bool = False, scale: Callable[[], float] = lambda: 2.0) -> Watched:
    left, right = parameter(7, 3, seed=seed), parameter(3, 5, seed=seed + 1)
    if zero:
        left.data.zero_()
    return Watched(name, (AdapterProduct(left, right, scale),))


def dense(seed: int = 0, dtype: torch.dtype = torch.float32) -> Watched:
    return Watched("dense", Dense(parameter(6, 4, seed=seed, dtype=dtype)))


def two_adapters() -> Watched:
    one, other = lora(seed=1), lora(seed=3, scale=lambda: -0.5)
    return Watched("both", (*one.terms, *other.terms))


def with_diagonal() -> Watched:
    left, right, diagonal = parameter(7, 3, seed=1), parameter(3, 5, seed=2), parameter(3, 1, seed=3)
    return Watched("adalora", (AdapterProduct(left, right, lambda: 2.0, diagonal=diagonal),))


def expert() -> Watched:
    return Watched("experts[1]", Dense(parameter(3, 6, 4, seed=5), lambda tensor: tensor[1]))


KINDS = {
    "LoRA that begins with zero": partial(lora, zero=True),
    "LoRA that does not": lora,
    "a sum of two adapters": two_adapters,
    "AdaLoRA": with_diagonal,
    "dense": dense,
    "dense in bf16": partial(dense, dtype=torch.bfloat16),
    "one expert of a stack": expert,
}


def multiplied_out(watched: Watched) -> Tensor:
    """The slow, obvious matrix, in float64."""
    matrix = watched.read()
    return (matrix.to_dense() if isinstance(matrix, LowRankMatrix) else matrix.double()).clone()


def train(*watched: Watched, seed: int, size: float = 0.05) -> None:
    """What an optimizer does: parameters change in place."""
    generator = torch.Generator().manual_seed(seed)
    for each in watched:
        for source in each.sources:
            with torch.no_grad():
                source += (size * torch.randn(source.shape, generator=generator)).to(source.dtype)


def assert_spectrum(found: Tensor | None, difference: Tensor) -> None:
    assert found is not None
    expected = torch.zeros(max(len(found), min(difference.shape)), dtype=torch.float64)
    values = torch.linalg.svdvals(difference)
    expected[: len(values)] = values
    torch.testing.assert_close(
        torch.nn.functional.pad(found, (0, len(expected) - len(found))), expected, rtol=0, atol=1e-12 * expected[0]
    )


def advanced(spectra: LiveSpectra) -> dict[str, MatrixSpectra]:
    measured = spectra.measure()
    spectra.advance()
    return measured


@pytest.mark.parametrize("cosines", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_totals_increments_and_inner_products(kind, cosines):
    watched = KINDS[kind]()
    past = [multiplied_out(watched)]
    spectra = LiveSpectra([watched], cosines=cosines)
    for step in range(1, 5):
        train(watched, seed=step)
        past.append(multiplied_out(watched))
        found = advanced(spectra)[watched.name]
        assert_spectrum(found.total, past[step] - past[0])
        assert_spectrum(found.increment, past[step] - past[step - 1])
        if cosines and step > 1 and not watched.is_dense:
            expected = ((past[step] - past[step - 1]) * (past[step - 1] - past[step - 2])).sum()
            assert found.inner_product == pytest.approx(float(expected), rel=1e-9, abs=1e-14)
        else:
            assert math.isnan(found.inner_product)


def test_a_scale_that_changes_is_part_of_the_update():
    scale = [2.0]
    watched = lora(scale=lambda: scale[0])
    spectra = LiveSpectra([watched])
    before = multiplied_out(watched)
    scale[0] = 3.0
    found = advanced(spectra)["lora"]
    assert_spectrum(found.increment, multiplied_out(watched) - before)
    assert_spectrum(found.total, multiplied_out(watched) - before)


def test_measuring_does_not_advance():
    watched = lora()
    spectra = LiveSpectra([watched])
    train(watched, seed=1)
    first, again = spectra.measure()["lora"], spectra.measure()["lora"]
    assert first.increment is not None
    assert again.increment is not None
    assert torch.equal(first.increment, again.increment)


@pytest.mark.parametrize("bytes_", [1, 2**11, 2**23])
def test_batches_do_not_show_in_the_numbers(monkeypatch, bytes_):
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": bytes_})
    watched = [*(lora(f"m{seed}", seed=seed, zero=seed % 2 == 0) for seed in range(7)), dense()]
    past = {each.name: multiplied_out(each) for each in watched}
    spectra = LiveSpectra(watched)
    train(*watched, seed=1)
    found = advanced(spectra)
    assert set(found) == set(past)
    for each in watched:
        assert_spectrum(found[each.name].total, multiplied_out(each) - past[each.name])


# ---- the start ----


def test_batches_are_solved_side_by_side_in_their_order(monkeypatch):
    """Three threads, each kept to one of torch's, give what one gives, beside a dense weight."""
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": 16 * 3 * 12})  # one product a batch
    matrices = [lora("a", seed=1), dense(3), *(lora(name, seed=seed) for seed, name in enumerate("bcde", start=5))]
    seen: set[tuple[int, int]] = set()
    solve = walk.solve_batch

    def watched(*arguments, **options):
        if isinstance(arguments[0][0], LowRankMatrix):
            seen.add((threading.get_ident(), torch.get_num_threads()))
        return solve(*arguments, **options)

    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        seen.clear()
        spectra = LiveSpectra(matrices)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(walk, "solve_batch", watched)
                results.append(spectra.measure())
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert {count for _, count in seen} == {1}
        assert all(ident != threading.get_ident() for ident, _ in seen) == (threads > 1)
    one, three = results
    assert list(one) == list(three) == [*"abcde", "dense"]
    for name, spectrum in one.items():
        assert torch.equal(spectrum.total, three[name].total)


def test_a_batch_that_fails_beside_others_costs_the_measurement_not_the_threads(monkeypatch):
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": 16 * 3 * 12})
    spectra, before = LiveSpectra([lora(name, seed=seed) for seed, name in enumerate("abcd")]), torch.get_num_threads()
    solve, calls = walk.solve_batch, []

    def fail_once(*arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("made up")
        return solve(*arguments, **options)

    monkeypatch.setattr(walk, "solve_batch", fail_once)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="made up"):
            spectra.measure()
        assert torch.get_num_threads() == 2
        assert list(spectra.measure()) == list("abcd")
    finally:
        torch.set_num_threads(before)


def test_the_start_is_kept_where_it_is_not_zero():
    spectra = LiveSpectra([lora("zero", zero=True), lora("not", seed=5), dense()])
    assert set(spectra.start) == {"not#0", "not#1", "not#scales", "dense#0"}


def test_the_start_does_not_follow_the_training():
    watched = dense()
    spectra, before = LiveSpectra([watched]), watched.sources[0].detach().clone()
    train(watched, seed=1)
    advanced(spectra)
    assert torch.equal(spectra.start["dense#0"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_goes_on_from_the_start(kind):
    watched = KINDS[kind]()
    past = [multiplied_out(watched)]
    start = LiveSpectra([watched]).start
    train(watched, seed=1)
    past.append(multiplied_out(watched))
    resumed = LiveSpectra([watched], start={name: tensor.clone() for name, tensor in start.items()})
    first = advanced(resumed)[watched.name]
    assert_spectrum(first.total, past[1] - past[0])
    assert first.increment is None  # nobody has seen the step before
    train(watched, seed=2)
    second = advanced(resumed)[watched.name]
    assert_spectrum(second.total, multiplied_out(watched) - past[0])
    assert_spectrum(second.increment, multiplied_out(watched) - past[1])


def test_without_the_start_a_dense_weight_has_no_total_and_a_product_is_one():
    adapter, weight = lora(), dense()
    spectra = LiveSpectra([adapter, weight], start={})
    found = advanced(spectra)
    assert_spectrum(found["lora"].total, multiplied_out(adapter))
    assert len(found["dense"].total) == 0
    assert (found["lora"].increment, found["dense"].increment) == (None, None)
    before = multiplied_out(weight)
    train(adapter, weight, seed=1)
    assert_spectrum(advanced(spectra)["dense"].increment, multiplied_out(weight) - before)


# ---- copies ----


def copies(spectra: LiveSpectra) -> int:
    """Numbers in memory beside the model; shared storage once."""
    tensors = [
        tensor
        for snapshot in (spectra._before, spectra._earlier, spectra._start)
        for tensor in snapshot.values.values()
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in tensors}.values())


@pytest.mark.parametrize(("cosines", "expected"), [(False, 1), (True, 2)])
def test_one_copy_of_the_factors_two_for_cosines(cosines, expected):
    watched = lora(zero=True)
    spectra = LiveSpectra([watched], cosines=cosines)
    for step in range(1, 5):
        train(watched, seed=step)
        advanced(spectra)
    assert copies(spectra) == expected * sum(source.numel() for source in watched.sources)


@pytest.mark.parametrize("cosines", [False, True])
@pytest.mark.parametrize("kind", ["LoRA that begins with zero", "LoRA that does not", "dense"])
def test_a_copy_that_fails_leaves_no_earlier_step(monkeypatch, kind, cosines):
    """An increment since an older step than it says would be a wrong number."""
    watched = [KINDS[kind](), lora("beside", seed=8)]
    past = [[multiplied_out(each) for each in watched]]
    spectra = LiveSpectra(watched, cosines=cosines)
    train(*watched, seed=1)
    spectra.measure()
    failing = pytest.MonkeyPatch()
    failing.setattr(spectra, "_copied", _no_memory)
    with failing.context(), pytest.raises(torch.OutOfMemoryError):
        spectra.advance()
    failing.undo()
    train(*watched, seed=2)
    found = advanced(spectra)
    for each, start in zip(watched, past[0], strict=True):
        assert found[each.name].increment is None
        assert_spectrum(found[each.name].total, multiplied_out(each) - start)
    past.append([multiplied_out(each) for each in watched])
    train(*watched, seed=3)
    found = advanced(spectra)
    for each, before in zip(watched, past[1], strict=True):
        assert_spectrum(found[each.name].increment, multiplied_out(each) - before)
        assert math.isnan(found[each.name].inner_product)


def _no_memory(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("out of memory")


# ---- gradients ----


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_what_a_small_step_along_them_does(kind):
    watched = KINDS[kind]()
    gradients = {id(each): parameter(*each.shape, seed=n, dtype=each.dtype) for n, each in enumerate(watched.sources)}
    found, columns = LiveSpectra([watched]).gradients(lambda source: gradients[id(source)])[0][watched.name]
    small = 1e-6

    def moved(by: float) -> Tensor:
        values = {id(each): each.detach().double() + by * gradients[id(each)].double() for each in watched.sources}
        matrix = watched.read(lambda source: values[id(source)])
        return matrix.to_dense() if isinstance(matrix, LowRankMatrix) else matrix

    expected = torch.linalg.svdvals((moved(small) - moved(-small)) / (2 * small)).detach()
    length = min(len(found), len(expected))
    torch.testing.assert_close(found[:length], expected[:length], rtol=0, atol=1e-6 * float(expected[0]))
    assert length == min(columns, *watched.read().shape)


def test_shapes_say_rank_and_storage():
    shapes = LiveSpectra([lora(), dense(dtype=torch.bfloat16), expert()]).shapes
    found = {name: (shape.out, shape.in_, shape.rank, shape.dtype) for name, shape in shapes.items()}
    assert found == {"lora": (7, 5, 3, "F32"), "dense": (6, 4, 0, "BF16"), "experts[1]": (6, 4, 0, "F32")}


def test_a_snapshot_holds_a_matrix_if_it_holds_all_its_parameters():
    watched = lora()
    left, right = watched.sources
    assert not Snapshot({id(left): left}).holds(watched)
    assert Snapshot({id(left): left, id(right): right}).holds(watched)
