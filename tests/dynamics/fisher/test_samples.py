import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynamics.fisher import samples as grams


def test_arrays_tensors_mappings_and_grams_are_read_alike():
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    tensor = torch.tensor(gram, requires_grad=True)
    for given in ({"a": gram}, {"a": tensor}, SimpleNamespace(gram={"a": tensor})):
        names, stacked = grams.blocks_of(given)
        assert (names, stacked.tolist()) == (["a"], [gram.tolist()])
    assert grams.blocks_of(gram.astype(np.float32))[0] == ["global"]


def test_rounding_is_made_symmetric():
    gram = np.array([[1.0, 0.5], [0.5 + 1e-7, 1.0]])
    stacked = grams.blocks_of(gram)[1]
    assert (stacked == stacked.swapaxes(1, 2)).all()


def test_a_block_that_is_not_finite_is_missing_and_the_others_are_not():
    stacked = grams.blocks_of({"a": np.array([[1.0, np.inf], [np.inf, 1.0]]), "b": np.eye(2)})[1]
    assert np.isnan(stacked[0]).all()
    assert (stacked[1] == np.eye(2)).all()


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((2, 3)), "Expected the Gram matrix K = GGᵀ of block 'global' as [sample, sample], got shape (2, 3)."),
        (np.ones(3), "got shape (3,)"),
        (np.ones((0, 0)), "got shape (0, 0)"),
        ({}, "Expected at least one block"),
        ({"a": np.eye(2), "b": np.eye(3)}, "Expected 2 samples in every block, got 3 in 'b'."),
        ({"a": np.array([[1.0, 0.5], [0.0, 1.0]])}, "Expected a symmetric K = GGᵀ, got one that is not for block 'a'."),
        (np.diag([1.0, -1.0]), "Expected squared norms on the diagonal of K = GGᵀ, got a negative one for 'global'."),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grams.blocks_of(gram)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: grams.codes_of(["a"], 2, "group"),
            "Expected one group for each of 2 samples, got labels of shape (1,).",
        ),
        (lambda: grams.members_of(["a"] * 3, 2), "Expected one task for each of 2 samples, got labels of shape (3,)."),
        (lambda: grams.members_of(["all", "b"], 2), "got 'all', which stands for all samples"),
        (
            lambda: grams.vectors_of({"a": [1.0, 2.0]}, ["a", "b"], 2, "b"),
            "Expected b for each of the 2 blocks, got none",
        ),
        (lambda: grams.vectors_of([1.0], ["a"], 2, "b"), "Expected b of block 'a' with shape (2,), got (1,)."),
        (lambda: grams.vectors_of({}, ["a"], 2, "b"), "Expected b for each of the 1 blocks, got none for 'a'"),
        (lambda: grams.vectors_of(None, ["a"], 2, "b"), "Expected b for each of the 1 blocks, got none at all."),
        (lambda: grams.numbers_of(1.0, ["a", "b"], "d"), "Expected a mapping of 2 blocks to their d, got one float."),
        (lambda: grams.numbers_of({"a": 1}, ["a", "b"], "d"), "Expected d for each of the 2 blocks, got none for 'b'."),
    ],
)
def test_labels_and_numbers_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
