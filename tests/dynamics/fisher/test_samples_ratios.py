import numpy as np

from dynamics.fisher.samples import log, ratio, root


def test_what_does_not_exist_is_nan_without_a_warning():
    with np.errstate(all="raise"):
        assert np.isnan(ratio([1.0, 0.0, 1.0], [0.0, 0.0, -1.0])).all()
        assert np.isnan(log([0.0, -1.0, np.nan])).all()
        assert np.isnan(root([-1.0, np.nan])).all()


def test_shapes_are_broadcast():
    assert ratio(np.ones((2, 1)), np.full(3, 2.0)).tolist() == [[0.5] * 3] * 2
