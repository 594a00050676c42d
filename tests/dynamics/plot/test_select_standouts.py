import numpy as np

from dynamics.plot.select import NAMED_BY_RULE, RULE, standouts
from tests.trees import example_tree, matrix_names


def test_names_the_largest_and_the_most_concentrated():
    update = example_tree(matrices=20)["update"].to_dataset()
    reasons = standouts(update)
    last = update.isel(step=-1).sel(kind="total")
    assert "update size: 1 of 20" in reasons[str(last["frobenius_norm"].idxmax("matrix").values)]
    assert "entropy deficit: 1 of 20" in reasons[str(last["entropy_deficit"].idxmax("matrix").values)]
    assert NAMED_BY_RULE <= len(reasons) <= 2 * NAMED_BY_RULE
    assert RULE.count(str(NAMED_BY_RULE)) == 2


def test_nothing_stands_out_where_nothing_moved():
    assert standouts(example_tree(zero=matrix_names(14))["update"].to_dataset()) == {}


def test_what_is_not_known_is_not_ranked():
    names = matrix_names(3)
    update = example_tree(matrices=3, missing=names[:2])["update"].to_dataset()
    assert np.isnan(update["frobenius_norm"].sel(kind="total").values[-1]).sum() == 2
    assert standouts(update) == {names[2]: "update size: 1 of 1; entropy deficit: 1 of 1"}
