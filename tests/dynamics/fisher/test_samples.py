import re

import numpy as np
import pytest
import torch

from dynamics.fisher.samples import StackedGram, codes_of
from probes import ProbeGram
from tests.dynamics.fisher.simulated import probe_gram


def test_arrays_and_tensors_are_read_alike():
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    for k in (gram, torch.tensor(gram, requires_grad=True), gram.astype(np.float32)):
        stacked = StackedGram.of(ProbeGram({"a": k}, update_product={"a": k[0]}, update_norm_squared={"a": 4.0}))
        assert (stacked.blocks, stacked.gram.tolist()) == (("a",), [gram.tolist()])
        assert (stacked.update_product.tolist(), stacked.update_norm.tolist()) == ([[2.0, 1.0]], [2.0])


def test_what_is_unknown_is_missing():
    stacked = StackedGram.of(ProbeGram({"a": np.eye(2)}))
    unknown = (stacked.update_product, stacked.update_norm, stacked.dimension, stacked.losses)
    assert all(np.isnan(array).all() for array in unknown)
    assert (stacked.labels.group.tolist(), stacked.tasks, stacked.batch_size) == ([0, 1], ("all",), 0)


def test_labels_are_numbers_and_all_comes_first():
    stacked = StackedGram.of(ProbeGram({"a": np.eye(3)}, tasks=("x", "y", "x"), groups=np.array([7, 7, 3])))
    assert stacked.tasks == ("all", "x", "y")
    assert stacked.labels.member.T.tolist() == [[True, True, True], [True, False, True], [False, True, False]]
    assert stacked.labels.group.tolist() == [1, 1, 0]


def test_rounding_is_made_symmetric():
    k = StackedGram.of(ProbeGram({"a": np.array([[1.0, 0.5], [0.5 + 1e-7, 1.0]])})).gram
    assert (k == k.swapaxes(1, 2)).all()


def test_a_block_that_is_not_finite_is_missing_and_the_others_are_not():
    k = StackedGram.of(ProbeGram({"a": np.array([[1.0, np.inf], [np.inf, 1.0]]), "b": np.eye(2)})).gram
    assert np.isnan(k[0]).all()
    assert (k[1] == np.eye(2)).all()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"a": np.ones((2, 3))},
            "Expected the Gram matrix K = GGᵀ of block 'a' as [sample, sample], got shape (2, 3).",
        ),
        ({"a": np.ones(3)}, "got shape (3,)"),
        ({"a": np.ones((0, 0))}, "got shape (0, 0)"),
        ({}, "Expected at least one block with its Gram matrix, got none."),
        ({"a": np.eye(2), "b": np.eye(3)}, "Expected 2 samples in every block, got 3 in 'b'."),
        ({"a": np.array([[1.0, 0.5], [0.0, 1.0]])}, "Expected a symmetric K = GGᵀ, got one that is not for block 'a'."),
        ({"a": np.diag([1.0, -1.0])}, "Expected squared norms on the diagonal of K = GGᵀ, got a negative one for 'a'."),
    ],
)
def test_what_is_no_gram_matrix_is_refused(blocks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StackedGram.of(ProbeGram(blocks))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": ["a"]}, "Expected one group for each of 2 samples, got labels of shape (1,)."),
        ({"tasks": ["a"] * 3}, "Expected one task for each of 2 samples, got labels of shape (3,)."),
        ({"tasks": ["all", "b"]}, "Expected names of tasks other than 'all', which stands for all samples."),
        ({"losses": np.ones(3)}, "Expected one loss for each of 2 samples, got shape (3,)."),
        (
            {"update_product": {"a": np.ones(2)}},
            "Expected an update product b = Gδ of each of 2 blocks, got none of 'b'.",
        ),
        (
            {"update_product": {"a": np.ones(2), "b": np.ones(1)}},
            "Expected an update product b = Gδ of block 'b' with shape (2,), got (1,).",
        ),
        ({"dimension": {"a": 1}}, "Expected a dimension of each of 2 blocks, got none of 'b'."),
    ],
)
def test_labels_and_numbers_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StackedGram.of(ProbeGram({"a": np.eye(2), "b": np.eye(2)}, **values))


def test_only_an_exact_gram_has_directions():
    StackedGram.of(probe_gram(np.eye(2))).require_exact()
    with pytest.raises(ValueError, match=re.escape("got that of gradients projected to 5 numbers")):
        StackedGram.of(probe_gram(np.eye(2), projection=5)).require_exact()


def test_without_labels_each_sample_has_its_own():
    assert codes_of((), 3, "group").tolist() == [0, 1, 2]
