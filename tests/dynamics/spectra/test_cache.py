"""What is kept on disk is believed only if it is exactly what was asked for."""

import pytest
import torch

from dynamics.spectra.cache import cache_folder, cached_tensors, content_key, write_tensors


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_written_is_read():
    tensors = {"a": torch.arange(6.0).reshape(2, 3).mT, "b": torch.ones(1, dtype=torch.float64)}
    assert cached_tensors("k", {"a": (3, 2), "b": (1,)}) is None
    assert write_tensors("k", tensors)
    found = cached_tensors("k", {"a": (3, 2), "b": (1,)})
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in cache_folder().iterdir()] == ["k.safetensors"]


@pytest.mark.parametrize("shapes", [{"a": (2, 3)}, {"a": (3,)}, {"b": (3, 2)}, {"a": (3, 2), "b": (1,)}])
def test_another_name_or_shape_is_not_taken(shapes):
    write_tensors("k", {"a": torch.zeros(3, 2)})
    assert cached_tensors("k", shapes) is None


def test_damage_is_as_if_it_were_not_there():
    write_tensors("k", {"a": torch.zeros(3)})
    path = cache_folder() / "k.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    assert cached_tensors("k", {"a": (3,)}) is None
    write_tensors("k", {"a": torch.tensor([0.0, torch.nan, 0.0])})
    assert cached_tensors("k", {"a": (3,)}) is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not write_tensors("k", {"a": torch.zeros(3)})
    assert cached_tensors("k", {"a": (3,)}) is None


def test_keys_are_of_content_format_shape_and_what_else_matters():
    one = torch.arange(6.0).reshape(2, 3)
    others = [one + 1, one.double(), one.reshape(3, 2), one.bfloat16()]
    assert len({content_key(one, 1), content_key(one, 2), *(content_key(other, 1) for other in others)}) == 6
    assert content_key(one.mT.contiguous().mT, 1) == content_key(one, 1)
    assert content_key(torch.zeros(0))
