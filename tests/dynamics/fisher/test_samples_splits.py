import numpy as np

from dynamics.fisher.samples import half_splits


def test_both_directions_cover_all_samples_and_the_seed_repeats_them():
    group = np.array([5, 5, 1, 2, 2, 9])
    once, again = (list(half_splits(group, 3, seed=4)) for _ in range(2))
    assert len(once) == 6
    for (first, second), (first_again, _) in zip(once, again, strict=True):
        assert sorted([*first, *second]) == list(range(6))
        assert first.tolist() == first_again.tolist()
        assert not set(group[first]) & set(group[second])
    assert once[0][0].tolist() == once[1][1].tolist()
