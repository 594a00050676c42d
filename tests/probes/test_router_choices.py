"""How a choice is read from what a router returns, and its sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probes.router_choices import Layout, MixturePass, Sums, learn, sums_of, tensors_in, token_count

LOGITS = torch.tensor([[3.0, 1.0, 0.0, -2.0], [0.0, 2.0, 4.0, 1.0], [1.0, -1.0, 5.0, 2.0]])
TOP = LOGITS.topk(2, -1)
#: Of the two largest logits of each row, by expert; and the sum of their distances to the third.
ASSIGNED, MARGIN = [1, 2, 2, 1], 1.0 + 1.0 + 1.0


def outputs(*tensors: Tensor) -> MixturePass:
    return MixturePass({0: list(tensors)})


WAYS = {
    "indices": outputs(LOGITS, TOP.values.softmax(-1), TOP.indices),
    "weights": outputs(torch.zeros_like(LOGITS).scatter(1, TOP.indices, TOP.values.sigmoid()), LOGITS),
    "mask": outputs(torch.zeros_like(LOGITS).scatter(1, TOP.indices, 1.0).bool(), LOGITS),
    "top_k": outputs(LOGITS),
    "arguments": MixturePass({0: [LOGITS]}, [torch.randn(3, 6), TOP.indices, TOP.values.softmax(-1)]),
    "rows": MixturePass({0: [LOGITS]}, rows={0: 1, 1: 2, 2: 2, 3: 1}, tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_the_same_counts(way: str) -> None:
    layout = learn(WAYS[way], 4, {0: 2} if way == "top_k" else {}, [0])
    assert layout is not None
    assert layout.way == way
    sums = sums_of(layout, WAYS[way])
    assert sums.assigned.tolist() == ASSIGNED
    assert sums.others.tolist() == ([3, 0, 0] if way == "rows" else [3, MARGIN, 3])


def test_soft_routing_sums_the_weights() -> None:
    call = MixturePass({0: [LOGITS]}, rows=dict.fromkeys(range(4), 3), tokens=3)
    layout = learn(call, 4, {}, [0])
    assert layout is not None
    assert layout.way == "soft"
    torch.testing.assert_close(sums_of(layout, call).assigned, LOGITS.double().softmax(-1).sum(0))


def test_probabilities_have_the_margin_of_their_logits() -> None:
    for scale, scores in (("softmax", LOGITS.softmax(-1)), ("sigmoid", LOGITS.sigmoid())):
        call = outputs(scores, TOP.values, TOP.indices)
        layout = learn(call, 4, {}, [0])
        assert layout is not None
        assert layout.scale == scale
        assert sums_of(layout, call).others[1] == pytest.approx(MARGIN, rel=1e-5)


def test_a_router_that_begins_at_zero_has_logits() -> None:
    layout = learn(outputs(torch.zeros(3, 4), TOP.values, TOP.indices), 4, {}, [0])
    assert layout is not None
    assert layout.scale == "logits"
    assert sums_of(layout, WAYS["indices"]).assigned.tolist() == ASSIGNED


def test_nothing_is_learnt_without_a_token() -> None:
    assert learn(outputs(torch.zeros(0, 4)), 4, {0: 2}, [0]) is None


def test_a_choice_whose_weight_is_not_finite_or_negative_is_a_choice() -> None:
    weights = torch.tensor([[torch.nan, 0.0, 0.5, 0.0], [0.0, -0.5, 0.0, 0.5]])
    layout = Layout("weights", 4, 0, choice=0, logits=1)
    assert sums_of(layout, outputs(weights, LOGITS[:2])).assigned.tolist() == [1, 1, 1, 1]


def test_a_router_is_told_from_a_gate_of_shared_experts() -> None:
    call = MixturePass({0: [torch.randn(3, 1)], 1: [LOGITS, TOP.values, TOP.indices]})
    layout = learn(call, 4, {}, [0, 1])
    assert layout is not None
    assert (layout.router, layout.way) == (1, "indices")


def test_weights_of_zero_and_indices_beyond_all_experts_are_no_choice() -> None:
    weights = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.5, 0.5]])
    indices = torch.tensor([[0, 1], [2, 4], [2, 3]])
    layout = Layout("indices", 4, 0, 2, 1, 0)
    assert sums_of(layout, outputs(LOGITS, weights, indices)).assigned.tolist() == [1, 0, 2, 1]


def test_choices_without_computation_are_counted_beside_the_experts() -> None:
    """A router of four, of which three hold weights."""
    layout = learn(WAYS["indices"], 3, {}, [0])
    assert layout is not None
    assert layout.experts == 4


def test_masked_tokens_do_not_count() -> None:
    call = MixturePass(WAYS["indices"].outputs, mask=torch.tensor([[True, False, True]]))
    sums = sums_of(Layout("indices", 4, 0, 2, 1, 0), call)
    assert sums.assigned.tolist() == [1, 1, 1, 1]
    assert sums.others.tolist() == [2, 2, 2]
    other = MixturePass(WAYS["indices"].outputs, mask=torch.ones(2, 2, dtype=torch.bool))  # of other tokens
    assert sums_of(Layout("indices", 4, 0, 2, 1, 0), other).others[0] == 3


def test_nothing_is_learnt_from_features() -> None:
    assert learn(MixturePass({0: [torch.randn(2, 3, 16)]}, [torch.randn(6, 16)]), 4, {}, [0]) is None


def test_sums_add_up() -> None:
    one = Sums(torch.ones(2, dtype=torch.float64), torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    both = one + one
    assert (both.assigned.tolist(), both.others.tolist()) == ([2, 2], [4, 1, 2])


def test_tensors_are_found_in_what_modules_return() -> None:
    one = torch.ones(2, 3)
    assert len(tensors_in({"a": one, "b": (None, [one, "text", 3])})) == 2
    assert token_count(torch.ones(2, 5, 3)) == 10
    assert token_count(torch.ones(())) == 0
