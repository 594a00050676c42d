from dynamics.report import summarise
from dynamics.report.words import how_far, how_many_directions, what_was_analysed
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
    assert how_far(unknown) == "The size of the whole update at step 600 is not known."
