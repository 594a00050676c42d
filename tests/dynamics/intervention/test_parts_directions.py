"""Weights of samples whose weighted gradients are the leading directions: orthonormal, and eigenvectors of GᵀG."""

from __future__ import annotations

import numpy as np

from dynamics.intervention.parts import direction_weights, leading_part

GRADIENTS = np.random.default_rng(0).standard_normal((7, 20))
GRAM = GRADIENTS @ GRADIENTS.T


def test_they_give_the_leading_right_singular_vectors() -> None:
    values, weights = direction_weights(GRAM, 3)
    directions = weights @ GRADIENTS
    sigma, vectors = np.linalg.svd(GRADIENTS)[1:]
    np.testing.assert_allclose(values, sigma[:3] ** 2, rtol=1e-12)
    np.testing.assert_allclose(directions @ directions.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.abs(directions @ vectors[:3].T), np.eye(3), atol=1e-9)


def test_the_part_in_them_is_the_leading_part() -> None:
    update = np.random.default_rng(1).standard_normal(20)
    product = GRADIENTS @ update
    directions = direction_weights(GRAM, 4)[1] @ GRADIENTS
    part = leading_part(GRAM, product, 4)
    np.testing.assert_allclose(part.weights @ GRADIENTS, directions.T @ (directions @ update), atol=1e-12)


def test_there_are_no_more_than_k_has_eigenvalues() -> None:
    values, weights = direction_weights(GRAM[:, :2] @ GRAM[:2, :], 5)
    assert len(values) == len(weights) == 2
