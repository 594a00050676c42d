import json

import numpy as np

from dynamics.report import summarise
from dynamics.report.sentences import (
    beside_the_base,
    how_far,
    how_many_directions,
    how_steep,
    how_straight,
    what_was_analysed,
)
from dynamics.text import number
from tests.trees import example_tree, matrix_names


def test_one_checkpoint_of_one_matrix():
    summary = summarise(example_tree(steps=1, matrices=1))
    assert what_was_analysed(summary) == "1 checkpoint (step 100); 1 weight matrix with LoRA updates of rank 8."
    assert "quartiles" not in how_many_directions(summary)


def test_several_trainings_are_said():
    summary = summarise(example_tree(steps=3, segment=[0, 1, 1]))
    assert what_was_analysed(summary).startswith(
        "3 checkpoints (steps 100 to 300), of 2 different trainings; 14 weight"
    )


def test_ranks_that_differ_are_a_range():
    tree = example_tree(steps=1, matrices=2)
    tree["update"]["adapter_rank"].values[:] = [4, 16]
    assert what_was_analysed(summarise(tree)).endswith("LoRA updates of rank 4 to 16.")


def test_dense_matrices_have_no_adapter_rank():
    tree = example_tree(steps=1, matrices=2)
    tree["update"]["adapter_rank"].values[:] = 0
    assert what_was_analysed(summarise(tree)).endswith("2 weight matrices.")


def test_what_is_not_known_is_not_made_up():
    zero = summarise(example_tree(zero=matrix_names(14)))
    assert how_far(zero) == "At step 600 no matrix has moved: every update is exactly zero."
    assert how_many_directions(zero) == ""
    unknown = {**zero, "totals": {"frobenius_norm_all": None}}
    assert how_far(unknown) == "At step 600 the size of the whole update is not known."


def captured(captured_steps, checkpoints, **changes):
    tree = example_tree(gradients=[100, 200], matrices=4, **changes)
    tree.attrs["captured"] = json.dumps({"steps": captured_steps, "checkpoints": checkpoints})
    return tree


def test_captured_steps_and_checkpoints_are_said_apart():
    said = what_was_analysed(summarise(captured([100, 200], [200])))
    assert said.startswith("Recorded at 2 steps, with 1 checkpoint (steps 100 to 600); 4 ")
    said = what_was_analysed(summarise(captured([100], [], steps=1)))
    assert said.startswith("Recorded at 1 step, without checkpoints (step 100); 4 weight matrices")


def test_the_last_gradient_in_one_sentence():
    tree = captured([100, 200], [])
    last = tree["summary_gradient"].to_dataset().sel(step=200)
    before, after, rank = (
        number(float(last[f"{name}_quantile"].sel(quantile=0.5)))
        for name in ("norm_before_clip", "norm_after_clip", "effective_rank_energy")
    )
    assert how_steep(summarise(tree)) == (
        f"At step 200 the median gradient norm of a matrix is {before} ({after} after clipping), and the median "
        f"effective rank (energy) of a gradient is {rank}; random factors have "
        f"{number(float(last['effective_rank_energy_null']))}."
    )


def test_what_clipping_left_alone_is_not_said_twice():
    tree = captured([100, 200], [], gradient_spectra=False)
    tree["summary_gradient"]["norm_after_clip_quantile"] = tree["summary_gradient"]["norm_before_clip_quantile"]
    assert how_steep(summarise(tree)).endswith(" (clipping left it unchanged).")


def test_no_gradient_no_sentence():
    assert how_steep(summarise(example_tree(steps=1))) == ""
    tree = captured([100, 200], [])
    tree["summary_gradient"]["norm_before_clip_quantile"][:] = np.nan
    assert how_steep(summarise(tree)) == ""


def test_a_sum_over_some_matrices_says_over_how_many():
    summary = summarise(example_tree(matrices=3))
    assert how_far(summary).endswith("over all matrices.")
    part = {**summary, "totals": {**summary["totals"], "matrices": 2}}
    assert how_far(part).endswith("over 2 of 3 matrices.")


def test_several_adapters_stand_by_themselves():
    adapters = [{"adapter": name, "matrices": 4, "frobenius_norm": 1.5} for name in ("policy", "reference")]
    summary = {**summarise(example_tree(matrices=3)), "adapters": adapters}
    assert how_far(summary) == (
        "At step 600 the update of policy has Frobenius norm 1.50 over 4 matrices and the update of reference has "
        "Frobenius norm 1.50 over 4 matrices. Adapters are not added up."
    )


def test_what_the_base_was_compared_with_is_counted():
    base = {"k": 10, "relative_size": 0.1, "matrices": 3, "of": 3}
    size = "The update has 10.0 % of the norm of the base weights (median over"
    assert beside_the_base({"base": base}) == f"{size} matrices)."
    part = {**base, "matrices": 2}
    assert beside_the_base({"base": part}) == f"{size} the 2 of 3 matrices that the base has)."
    none = {"k": 10, "relative_size": None, "matrices": 0, "of": 3}
    assert beside_the_base({"base": none}) == "None of the 3 matrices could be compared with the base."
    assert beside_the_base({"base": None}) == ""


def path(share, straightness, checkpoints=8, **walk):
    shape = {"component_share": [share, 0.01], "participation_ratio": 1.13, "straightness": straightness}
    return {"path": {"checkpoints": checkpoints, **shape, **walk}}


WALK = {"component_share_null": 0.811, "participation_ratio_null": 1.5, "straightness_null": 0.353}


def test_a_path_along_one_line_is_called_that_beside_a_random_walk():
    assert how_straight(path(0.938, 0.559, **WALK)) == (
        "The checkpoints lie almost on one line: the leading direction holds 93.8 % of the squared distance "
        "(participation ratio 1.13; a random walk with steps of these lengths has 81.1 % and 1.50). The path was 1.8 "
        "times as long as the straight line from start to end (the random walk: 2.8 times)."
    )


def test_a_path_along_several_directions_is_not_called_a_line():
    assert how_straight(path(0.5, 0.25, **WALK)).startswith(
        "The checkpoints do not lie on one line: the leading direction holds 50.0 % of the squared distance "
    )


def test_a_line_that_a_random_walk_makes_too_proves_nothing():
    words = how_straight(path(0.96, 0.9, **{**WALK, "component_share_null": 0.97}))
    assert words.startswith("The checkpoints lie almost on one line, as a random walk's would: ")


def test_a_result_of_an_earlier_version_has_no_walk_beside_it():
    assert how_straight(path(0.938, 0.559)) == (
        "The checkpoints lie almost on one line: the leading direction holds 93.8 % of the squared distance "
        "(participation ratio 1.13). The path was 1.8 times as long as the straight line from start to end."
    )


def test_a_path_that_ends_where_it_began_has_no_ratio():
    assert how_straight(path(0.938, 0.0)).endswith("(participation ratio 1.13).")


def test_two_checkpoints_have_no_shape():
    assert how_straight(path(1.0, 1.0, checkpoints=2)) == ""
