"""What hooks count of a mixture's routers is what a plain forward pass shows, and the training does not notice."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes.router_choices import Sums
from probes.routers import Mixture, Routing, find_mixtures
from tests.mixtures import batch, loss, mixture

#: One of each way in which a family passes its choice on.
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe", "granitemoe"),
    *("switch_transformers", "gemma4_text", "longcat_flash", "zaya", "inkling_text", "ernie4_5_moe"),
)


def counted(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Sums]:
    """What routers chose in a training step over these micro-batches."""
    routing = Routing(model)
    routing.arm()
    for words in batches:
        loss(model, words).backward()
    routing.disarm()
    return routing.take()


def dispatched(model: nn.Module, words: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slow twin: for every expert, the tokens whose output changes if its weights are taken away.

    The router's choice does not depend on them, so that a token changes exactly if it was sent there. Blocks that are
    not called as such are left out.
    """
    result = {}
    for found in find_mixtures(model):
        if found.is_named and found.holders and not found.name.endswith("self_attention.experts"):
            assigned = [float(_changed(model, words, found, expert).sum()) for expert in range(found.experts)]
            result[found.name] = torch.tensor(assigned, dtype=torch.float64)
    return result


@torch.no_grad()
def _changed(model: nn.Module, words: dict[str, Tensor], found: Mixture, expert: int) -> Tensor:
    outputs = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2).clone())

    parts = [parameter for holder in found.holders.values() for parameter in _weights(holder, expert)]
    before = [part.clone() for part in parts]
    handle = found.block.register_forward_hook(keep)
    loss(model, words)
    for part in parts:
        part.add_(torch.rand_like(part) + 1)
    loss(model, words)
    handle.remove()
    for part, value in zip(parts, before, strict=True):
        part.copy_(value)
    mask = words["attention_mask"].flatten().bool() | ("decoder" in found.name)
    return (outputs[0] != outputs[1]).any(-1) & (mask if len(mask) == len(outputs[0]) else True)


def _weights(holder: nn.Module, expert: int) -> list[Tensor]:
    """Views of the weights of one expert."""
    if isinstance(holder, nn.ModuleList | nn.ModuleDict):
        return [parameter.data for parameter in list(holder.children())[expert].parameters()]
    return [p.data[expert] for p in holder.parameters(recurse=False) if p.ndim == 3 and len(p) > expert]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_counted_as_its_outputs_show(family: str) -> None:
    model = mixture(family)
    words = batch(model)
    sums = counted(model, words)
    expected = dispatched(model, words)
    compared = sums.keys() & expected.keys()
    assert compared
    for name, one in sums.items():
        if name not in compared:  # JetMoE's attention, whose choice is that of its router alone
            assert one.assigned.sum() == 2 * one.others[0]
            continue
        assert one.assigned[: len(expected[name])].tolist() == expected[name].tolist(), name
        mask = words["attention_mask"]
        assert one.others[0] in (mask.sum(), mask.numel())


def test_the_rows_of_experts_are_the_truth_where_a_model_does_not_follow_its_router() -> None:
    """NLLB takes the 0 and 1 of its router's mask for numbers of experts, up to transformers 5.23 at least."""
    model = mixture("nllb-moe")
    words = batch(model)
    rows = dict.fromkeys(range(5), 0)
    for number, expert in enumerate(list(model.model.encoder.layers[0].ffn.experts.children())[:5]):
        expert.register_forward_pre_hook(lambda _, arguments, n=number: rows.update({n: len(arguments[0])}))
    sums = counted(model, words)["model.encoder.layers.0.ffn"]
    assert sums.assigned.tolist() == list(rows.values())
    assert sums.others[0] == 14


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_loads_and_margins_are_those_of_the_models_own_router_logits(family: str) -> None:
    model = mixture(family)
    words = batch(model)
    logits = model(**words, output_router_logits=True).router_logits
    for (name, one), scores in zip(counted(model, words).items(), logits, strict=True):
        scores = scores[words["attention_mask"].flatten().bool()].double()
        ranked = scores.sort(-1, descending=True)
        twin = torch.bincount(ranked.indices[:, :2].flatten(), minlength=5)
        assert one.assigned.tolist() == twin.tolist(), name
        margin = (ranked.values[:, 1] - ranked.values[:, 2]).sum().detach()
        assert one.others.tolist() == pytest.approx([len(scores), float(margin.detach()), len(scores)], rel=1e-12)


def test_padding_is_left_out_only_where_the_mask_is_given() -> None:
    model = mixture("mixtral")
    words = batch(model)
    masked = counted(model, words)
    whole = counted(model, {"input_ids": words["input_ids"], "labels": words["labels"]})
    name = "model.layers.0.mlp"
    assert (masked[name].others[0], whole[name].others[0]) == (12, 14)
    assert (masked[name].assigned.sum(), whole[name].assigned.sum()) == (24, 28)


def test_micro_batches_add_up() -> None:
    model = mixture("qwen2_moe")
    first, second = batch(model, 1), batch(model, 2)
    both, one, other = counted(model, first, second), counted(model, first), counted(model, second)
    assert all(torch.equal(both[name].assigned, one[name].assigned + other[name].assigned) for name in both)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_gradient_checkpointing_repeats_is_counted_once(reentrant: bool) -> None:
    model = mixture("mixtral")
    words = batch(model)
    expected = counted(model, words)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    sums = counted(model, words)
    assert all(torch.equal(sums[name].assigned, expected[name].assigned) for name in expected)


def test_evaluation_and_generation_are_not_counted() -> None:
    model = mixture("mixtral")
    words = batch(model)
    expected = counted(model, words)
    routing = Routing(model)
    routing.arm()
    with torch.no_grad():
        model.eval()(**words)
        model.train().generate(words["input_ids"], max_new_tokens=2, do_sample=False)
    loss(model, words).backward()
    routing.disarm()
    sums = routing.take()
    assert all(torch.equal(sums[name].assigned, expected[name].assigned) for name in expected)


def test_a_training_in_evaluation_mode_is_counted() -> None:
    model = mixture("mixtral").eval()
    assert counted(model, batch(model))["model.layers.0.mlp"].others[0] == 12


def adapted(**options: Any) -> Any:
    return peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "router", "router saved", "experts"],
)
def test_under_adapters_names_and_counts_are_those_of_the_base(options: dict[str, Any]) -> None:
    plain, model = mixture("mixtral"), adapted(**options)
    words = batch(plain)
    expected, sums = counted(plain, words), counted(model, words)
    assert sums.keys() == expected.keys()
    assert all(torch.equal(sums[name].assigned, expected[name].assigned) for name in expected)


class Connector(nn.Module):
    """A projection from one tower to another by a soft mixture: every expert gets every token, with a weight."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(experts))
        self.router = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, experts))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.router(tokens).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(tokens) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


def test_soft_routing_sums_weights() -> None:
    torch.manual_seed(0)
    model = Connector()
    tokens = torch.randn(2, 5, 4)
    routing = Routing(model)
    routing.arm()
    model(tokens).sum().backward()
    routing.disarm()
    sums = routing.take()[""]
    weights = model.router(tokens).softmax(-1).flatten(0, 1).double()
    torch.testing.assert_close(sums.assigned, weights.detach().sum(0), rtol=1e-6, atol=0)
    largest = weights.log().sort(-1, descending=True).values
    assert sums.others[1] == pytest.approx(float((largest[:, 0] - largest[:, 1]).sum()), rel=1e-5)
    assert routing.is_soft("")


class Listed(nn.Module):
    """A block as written before experts were fused: a linear router, and a list of experts called with their tokens.

    Args:
        width: Of the router, which is said to be sent to ``top_k`` experts.
    """

    def __init__(self, experts: int = 4, top_k: int = 2, *, says_k: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(4, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        self.number = top_k
        if says_k:
            self.top_k = top_k

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten(0, -2)
        weights, indices = self.gate(flat).softmax(-1).topk(self.number, -1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = (indices == number).nonzero(as_tuple=True)
            result = result.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return result.view_as(tokens)


@pytest.mark.parametrize("says_k", [True, False])
def test_a_list_of_experts_behind_a_linear_router(says_k: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Listed(says_k=says_k), torch.randn(2, 5, 4)
    routing = Routing(model)
    routing.arm()
    model(tokens).sum().backward()
    routing.disarm()
    sums = routing.take()[""]
    chosen = model.gate(tokens).flatten(0, 1).topk(2, -1).indices
    assert sums.assigned.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
    assert sums.others[0] == 10


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (5, 5)])
def test_one_expert_and_all_experts(experts: int, top_k: int) -> None:
    model = mixture("mixtral", num_local_experts=experts, num_experts_per_tok=top_k)
    sums = counted(model, batch(model))["model.layers.1.mlp"]
    assert sums.assigned.tolist() == [12.0] * experts
    assert sums.others.tolist() == [12, 0, 0]  # nothing is refused, so that there is no margin


def test_a_block_that_is_called_twice_counts_twice() -> None:
    model = mixture("mixtral")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    sums = counted(model, batch(model))
    assert {name: float(one.others[0]) for name, one in sums.items()} == {"model.layers.0.mlp": 24}


def test_logits_that_are_not_finite_leave_counts_and_no_margin() -> None:
    model = mixture("mixtral")
    model.model.layers[1].mlp.gate.weight.data[0] = torch.nan
    routing = Routing(model)
    routing.arm()
    loss(model, batch(model))
    routing.disarm()
    sums = routing.take()["model.layers.1.mlp"]
    assert sums.assigned.sum() == 24
    assert sums.others[1].isnan()


def test_in_half_precision_counts_are_exact() -> None:
    model = mixture("mixtral").to(torch.bfloat16)
    words = batch(model)
    logits = model(**words, output_router_logits=True).router_logits
    for one, scores in zip(counted(model, words).values(), logits, strict=True):
        probabilities = scores[words["attention_mask"].flatten().bool()].float().softmax(-1)
        assert one.assigned.tolist() == torch.bincount(probabilities.topk(2).indices.flatten(), minlength=5).tolist()


def test_no_tokens_at_all() -> None:
    model = mixture("mixtral")
    words = batch(model)
    words["attention_mask"].zero_()
    routing = Routing(model)
    routing.arm()
    loss(model, batch(model))  # learns where choices are
    routing.take()
    loss(model, words)
    routing.disarm()
    sums = routing.take()["model.layers.0.mlp"]
    assert sums.assigned.tolist() == [0] * 5
    assert sums.others.tolist() == [0, 0, 0]


def test_layers_with_other_numbers_of_experts_and_without() -> None:
    model = nn.Sequential(Listed(4), nn.Linear(4, 4), Listed(3))
    routing = Routing(model)
    routing.arm()
    model(torch.randn(3, 4)).sum().backward()
    routing.disarm()
    assert {name: len(one.assigned) for name, one in routing.take().items()} == {"0": 4, "2": 3}


def test_experts_whose_choice_nothing_shows_are_named() -> None:
    model = mixture("doge")
    routing = Routing(model)
    routing.arm()
    loss(model, batch(model))
    routing.disarm()
    assert routing.take() == {}
    reason = "nothing that passes through it tells which experts were chosen"
    assert routing.unread() == {f"model.layers.{layer}.mlp": reason for layer in range(2)}


def test_a_model_without_experts_has_no_mixture() -> None:
    assert not [m for m in find_mixtures(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))) if m.is_named]


class Stacked(nn.Module):
    """Layers in a row and a head with as many outputs: nothing to do with experts."""

    def __init__(self, *, pools: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head, self.pools = nn.Linear(4, 3), pools

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1) if self.pools else tokens)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table[0]


class Tagger(nn.Module):
    """A weight with three dimensions, and a head with as many outputs as it has entries in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = Positions(), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.positions(tokens))


@pytest.mark.parametrize("model", [Stacked(pools=False), Stacked(pools=True), Tagger()], ids=["row", "pooled", "stack"])
def test_layers_beside_a_head_of_as_many_outputs_are_no_experts(model: nn.Module) -> None:
    routing = Routing(model)
    assert routing.mixtures  # until they are called
    routing.arm()
    model(torch.randn(2, 5, 4)).sum().backward()
    routing.disarm()
    assert routing.take() == {}
    assert not routing.mixtures
    assert routing.unread() == {}


class Keywords(Listed):
    """Experts without a word on scores, called by keyword, inside a model that knows their number."""

    def __init__(self) -> None:
        super().__init__(says_k=False)
        self.gate, self.table = nn.Identity(), nn.Embedding(5, 4)  # type: ignore[assignment]

    def forward(self, *, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([self.experts[0](input=tokens[:2]), self.experts[3](input=tokens[2:])])


def test_blocks_and_experts_that_are_called_by_keyword() -> None:
    model = nn.Module()
    model.num_experts, model.mlp = 4, Keywords()
    model.forward = lambda tokens: model.mlp(tokens=tokens)  # type: ignore[method-assign]
    routing = Routing(model)
    routing.arm()
    model(torch.randn(5, 4)).sum().backward()
    routing.disarm()
    sums = routing.take()
    assert sums["mlp"].assigned.tolist() == [2, 0, 0, 3]
    assert sums["mlp"].others[0] == 5
    assert routing.unread() == {}  # what is read inside of it need not be read of the whole


def test_a_fault_in_a_hook_is_told_later_and_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("mixtral")
    routing = Routing(model)
    monkeypatch.setattr("probes.routers.sums_of", lambda *_: 1 / 0)
    routing.arm()
    loss(model, batch(model)).backward()
    routing.disarm()
    with pytest.raises(RuntimeError, match=r"Routing was not counted \(ZeroDivisionError: division by zero\)\."):
        routing.take()
    assert model.model.layers[0].mlp.gate.weight.grad is not None


def test_nothing_is_left_on_the_model() -> None:
    model = mixture("mixtral")
    hooks = lambda: [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]  # noqa: E731
    before = hooks()
    counted(model, batch(model))
    assert hooks() == before


def test_a_compiled_model_computes_the_same_and_is_not_counted() -> None:
    """The hooks are there while it is compiled, and leave nothing in the compiled graph."""
    torch.manual_seed(0)
    model, tokens = Connector(), torch.randn(3, 4)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(tokens)
    torch._dynamo.reset()
    routing = Routing(model)
    routing.arm()
    torch.compile(model, backend=backend)(tokens).sum().backward()
    routing.disarm()
    assert routing.take() == {}
    assert set(routing.unread().values()) == {"no forward pass was seen in it: it is compiled, or not in use"}
    plain, hooked = graphs
    assert hooked == plain


def test_a_block_inside_a_checkpoint_of_the_users_own() -> None:
    torch.manual_seed(0)
    model, tokens = Listed(), torch.randn(3, 4, requires_grad=True)
    routing = Routing(model)
    routing.arm()
    checkpoint(model, tokens, use_reentrant=False).sum().backward()
    routing.disarm()
    assert routing.take()[""].others[0] == 3
