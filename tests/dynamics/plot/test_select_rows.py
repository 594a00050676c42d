from dynamics.plot.select import row_groups
from tests.trees import example_tree


def groups(names):
    return row_groups(example_tree(steps=1, matrices=names)["update"].to_dataset())


def test_layers_are_in_numeric_order_whatever_the_order_of_the_files():
    (group,) = groups(["h.0.q", "h.1.q", "h.10.q", "h.2.q"])
    assert (group.label, group.positions, group.labels) == ("q", (0, 1, 3, 2), ("0", "1", "2", "10"))


def test_roles_that_occur_once_share_a_group():
    first, last = groups(["h.0.q", "h.1.q", "lm_head", "embed"])
    assert first.numbered
    assert (last.label, last.labels, last.numbered) == ("single matrices", ("lm_head", "embed"), False)


def test_experts_of_a_layer_are_told_apart():
    (group,) = groups([f"h.{layer}.experts.{expert}.w1" for layer in (0, 1) for expert in (0, 1)])
    assert group.labels == ("0.0", "0.1", "1.0", "1.1")


def test_stacks_of_layers_are_told_apart():
    labels = [group.label for group in groups(["vision.0.q", "vision.1.q", "text.0.q", "text.1.q"])]
    assert labels == ["q in vision", "q in text"]


def test_every_matrix_is_shown_once():
    names = ["lm_head", *(f"a.{n}.q" for n in range(3)), *(f"b.{n}.v" for n in range(2)), "norm"]
    assert sorted(position for group in groups(names) for position in group.positions) == list(range(len(names)))
