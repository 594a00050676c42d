"""Whose row is whose: found out exactly, in every precision, at every scale, whatever samples do together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from probes import Task, gradient_gram, probe_batches
from probes.layer_rules import Call
from probes.losses import token_losses
from probes.ownership import Split, samples_of_rows, split_by
from tests.reference import flat_gradients
from tests.runs import VOCABULARY, llama

Batch = dict[str, Tensor]


class Net(nn.Module):
    """A layer, something done to its rows, a layer."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(4, 5), nn.Linear(5, 2), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).tanh()))


def numbers(samples: int, tokens: int = 3) -> Batch:
    return {"x": torch.randn(samples, tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def error(model: nn.Module, batch: Batch, loss: Callable = squares) -> tuple[float, tuple[str, ...]]:
    """Largest error of an entry of K, each by the norms of its own two gradients; what was measured one by one."""
    found = gradient_gram(model, batch, loss, space="factor")
    gradients = flat_gradients(model, batch, loss)
    expected, sizes = gradients @ gradients.mT, gradients.norm(dim=1)
    return float(((found.gram["global"] - expected).abs() / (sizes[:, None] * sizes)).max()), found.one_by_one


def halves_swapped(x: Tensor) -> Tensor:
    return torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])


def rows_of(function: Callable[[Tensor], Tensor], samples: int, rows: int) -> tuple[Tensor | None, bool]:
    """What is found of a layer's rows, whose losses are a function of its output; whether anything is."""
    layer, x = nn.Linear(3, 4).double(), torch.randn(rows, 3, dtype=torch.float64)
    output = layer(x)
    losses = function(output)
    assert len(losses) == samples
    (gradient,) = torch.autograd.grad(losses.sum(), output, retain_graph=True)
    call = Call(layer, x, output, output._version, plain=True)
    found = samples_of_rows(losses, [call], {id(call): gradient})
    return found.get(id(call)), id(call) in found


def sums(of_row: list[int]) -> Callable[[Tensor], Tensor]:
    """Losses of samples whose rows these are; −1 for a row that no loss depends on."""
    used = torch.tensor(of_row) >= 0
    return lambda output: torch.zeros(max(of_row) + 1, dtype=output.dtype).index_add(
        0, torch.tensor(of_row)[used], output.square().sum(1)[used]
    )


@pytest.mark.parametrize("of_row", [[0, 0, 1, 1, 2, 2], [0, 1], list(range(40)), [n // 2 for n in range(600)]])
def test_rows_in_order(of_row: list[int]) -> None:
    assert rows_of(sums(of_row), max(of_row) + 1, len(of_row)) == (None, True)


@pytest.mark.parametrize(
    "of_row",
    [
        [0, 0, 1, 1, 1],
        [1, 0],
        [0, 0, 1, 0],
        [2, -1, 0, 1, 0, 2, -1],
        [2, 2, 2],  # the others have none
        list(range(40))[::-1],
        [7 * n % 256 for n in range(256)],
    ],
)
def test_rows_in_any_order_and_number(of_row: list[int]) -> None:
    found, _ = rows_of(sums(of_row), max(of_row) + 1, len(of_row))
    assert found is not None
    assert found.tolist() == of_row


SHARED = {
    "one row of two samples": lambda y: torch.stack([y[0].square().sum() + y[1].sum(), y[1].square().sum()]),
    "equal samples": lambda y: torch.stack([y[0].sum(), y[0].sum(), y[1].sum(), y[2].sum()]),
    "gradients that cancel": lambda y: torch.stack([y[0].sum() + y[1].square().sum(), -y[0].sum()]),
    "1e-12 of another": lambda y: torch.stack([y[0].sum() + 1e-12 * y[1].sum(), y[1].sum()]),
    "a small sample beside a large one": lambda y: torch.stack([1e9 * y[:2].sum(), 1e-9 * y[1:].sum()]),
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_that_samples_share(name: str) -> None:
    samples = 4 if name == "equal samples" else 2
    assert rows_of(SHARED[name], samples, 4) == (None, False)


def test_splits_of_several_calls() -> None:
    split = split_by(2, [torch.tensor([1, -1, 0]), None], [3, 4])
    rows = [torch.arange(3.0)[:, None], torch.arange(10.0, 14)[:, None]]
    assert split(rows)[..., 0].tolist() == [[2, 10, 11], [0, 12, 13]]
    assert Split(2)(rows[1:])[..., 0].tolist() == [[10, 11], [12, 13]]
    assert split_by(3, [torch.tensor([2, -1])], [2])([rows[0][:2]])[..., 0].tolist() == [[0], [0], [0]]


# ---- samples that change places, and samples that meet ----


@pytest.mark.parametrize("samples", [2, 16, 32, 64])
@pytest.mark.parametrize("between", [halves_swapped, lambda x: x.flip(0), lambda x: x[x.sum((1, 2)).argsort()]])
def test_samples_in_another_order(samples: int, between: Callable[[Tensor], Tensor]) -> None:
    apart, slow = error(Net(between), numbers(samples))
    assert apart < 1e-10
    assert slow == ()


@pytest.mark.parametrize("share", [0.5, 1e-3, 1e-7, 1e-11])
@pytest.mark.parametrize("scales", [[1, 1, 1, 1], [1, 1e-8, 1, 1], [1e8, 1, 1e-4, 1]])
def test_samples_that_mix(share: float, scales: list[float]) -> None:
    """A small sample's part in a large one's row is as much an error as the other way round."""
    model = Net(lambda x: x + share * x.roll(1, 0))
    apart, slow = error(model, numbers(4), lambda model, batch: squares(model, batch) * torch.tensor(scales).double())
    assert apart < 1e-10
    assert set(slow) == {"first.weight", "first.bias"}


MEET = {
    "batch normalisation": lambda x: (x - x.mean(0)) / x.var(0).sqrt(),
    "attention over samples": lambda x: nn.functional.softmax(x.flatten(1) @ x.flatten(1).mT, 1) @ x.flatten(1),
    "running sums": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", MEET)
def test_samples_that_meet(name: str) -> None:
    model = Net(lambda x: MEET[name](x).reshape(x.shape))
    apart, slow = error(model, numbers(5))
    assert apart < 1e-10
    assert set(slow) == {"first.weight", "first.bias"}


def test_negatives_of_the_batch() -> None:
    """Two-dimensional text alone, and a loss of the user's."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    rows = torch.randint(9, (5, 2, 6), generator=torch.Generator().manual_seed(0))

    def contrastive(model: nn.Module, batch: Batch) -> Tensor:
        left, right = (nn.functional.normalize(model(batch[key]).mean(1), dim=-1) for key in ("a", "b"))
        return nn.functional.cross_entropy(left @ right.mT / 0.05, torch.arange(len(left)), reduction="none")

    apart, slow = error(model, {"a": rows[:, 0], "b": rows[:, 1]}, contrastive)
    assert apart < 1e-10
    assert len(slow) == 3


def test_a_loss_that_calls_the_model_for_each_sample() -> None:
    loop = lambda model, batch: torch.stack([squares(model, {"x": x[None]}).sum() for x in batch["x"]])  # noqa: E731
    apart, slow = error(Net(nn.Identity()), numbers(5), loop)
    assert apart < 1e-10
    assert slow == ()


def test_sentences_packed_into_one_row() -> None:
    of_token = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])

    def packed(model: nn.Module, batch: Batch) -> Tensor:
        losses = model(batch["x"]).square().sum(2)[0]
        return torch.zeros(3, dtype=losses.dtype).index_add(0, of_token, losses)

    apart, slow = error(Net(torch.tanh), numbers(1, 9), packed)
    assert apart < 1e-10
    assert slow == ()


class Mixed(nn.Module):
    """A language model that does something to the rows of its samples, with its own loss."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.between = llama().double(), between
        self.config = self.inner.config
        self.mix = nn.Linear(16, 16).double()

    def forward(self, input_ids: Tensor, labels: Tensor, **_: object) -> object:
        embedded = self.between(self.mix(self.inner.model.embed_tokens(input_ids)))
        return self.inner(inputs_embeds=embedded, labels=labels)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of samples whose rows were looked at."""
    numbers: list[int] = []
    real = samples_of_rows
    monkeypatch.setattr(
        "probes.per_sample.samples_of_rows",
        lambda losses, calls, rows: numbers.append(len(losses)) or real(losses, calls, rows),
    )
    return numbers


def texts(samples: int, tokens: int = 5) -> Batch:
    rows = torch.randint(VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": rows, "labels": rows}


@pytest.mark.parametrize("meet", [True, False])
def test_texts_and_the_models_own_loss_are_looked_at_once_a_stream(meet: bool, looked: list[int]) -> None:
    batches = [{"input_ids": part, "labels": part} for part in texts(6)["labels"].split(2)]
    model = Mixed((lambda x: x + 0.1 * x.mean(0)) if meet else nn.Identity())
    found = gradient_gram(model, batches)
    expected = torch.cat([flat_gradients(model, batch, token_losses) for batch in batches])
    torch.testing.assert_close(found.gram["global"], expected @ expected.mT, rtol=1e-9, atol=1e-12)
    assert looked == ([2, 2, 2] if meet else [2])


#: Two samples by themselves, the first and one in the middle, tell that the rows of all have to be looked at.
TOLD_BY_TWO = {
    "means of the batch": lambda x: x + 0.1 * x.mean(0),
    "batch normalisation": lambda x: (x - x.mean(0)) / (x.var(0) + 1).sqrt(),
    "attention over samples": lambda x: MEET["attention over samples"](x).reshape(x.shape),
    "neighbours": lambda x: x + 1e-3 * x.roll(1, 0),
    "hardly": lambda x: x + 1e-11 * x.roll(1, 0),
    "sums from the first": lambda x: x.cumsum(0) / 4,
    "sums from the last": lambda x: x.flip(0).cumsum(0).flip(0) / 4,
    "the first to all": lambda x: x + 1e-9 * x[:1],
    "the last to all": lambda x: x + 1e-9 * x[-1:],
    "only many": lambda x: x + 1e-3 * x.mean(0) if len(x) > 2 else x,
    "only samples like the others": lambda x: x + 0.1 * torch.where(x[:, :1].mean(2) > 0, x.mean(1), 0).mean(0),
    "a common scale": lambda x: x / x.abs().amax(),
}


@pytest.mark.parametrize("name", TOLD_BY_TWO)
def test_two_texts_tell_that_samples_meet(name: str, looked: list[int]) -> None:
    model, batch = Mixed(TOLD_BY_TWO[name]), texts(16)
    found = gradient_gram(model, batch)
    gradients = flat_gradients(model, batch, token_losses)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-9, atol=1e-12)
    assert looked[-1] == 16
    assert "mix" in {name.split(".")[0] for name in found.one_by_one}


@pytest.mark.parametrize("between", [halves_swapped, lambda x: x.flip(0)])
def test_two_texts_tell_that_samples_change_places(between: Callable[[Tensor], Tensor], looked: list[int]) -> None:
    model, batch = Mixed(between), texts(16)
    found = gradient_gram(model, batch)
    gradients = flat_gradients(model, batch, token_losses)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-9, atol=1e-12)
    assert looked[-1] == 16
    assert found.one_by_one == ()


@pytest.mark.parametrize("space", ["tangent", "factor", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_texts_stand_for_those_of_a_stream(space: str, dtype: torch.dtype, looked: list[int]) -> None:
    """K is the same to the last digit as with all rows looked at."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(llama(), lora).to(dtype)  # pyright: ignore[reportArgumentType]
    batches = [{key: value[first : first + 16] for key, value in texts(32, 9).items()} for first in (0, 16)]
    found = gradient_gram(model, batches, space=space)
    assert looked == [2]
    all_of_them = gradient_gram(model, [batch | {"return_dict": True} for batch in batches], space=space)
    assert looked == [2, 16]
    assert found.gram.keys() == all_of_them.gram.keys()
    assert all(torch.equal(gram, all_of_them.gram[name]) for name, gram in found.gram.items())


def test_texts_without_labels_do_not_stand_for_others(looked: list[int]) -> None:
    model, batch = Mixed(nn.Identity()), texts(17)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][[0, 8]] = -100
    found = gradient_gram(model, batch, skip_broken=True)
    assert found.left_out == (0, 8)
    assert looked == [2]
    batch["labels"][1:] = -100
    batch["labels"][0] = batch["input_ids"][0]
    assert len(gradient_gram(model, batch, skip_broken=True).left_out) == 16
    assert looked == [2, 17]


@pytest.mark.parametrize("how", ["loss=", "Task"])
def test_losses_of_the_users_are_looked_at_for_each_batch(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch may tell nothing: here samples meet in the second alone."""
    model = Net(torch.tanh)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        losses = model(batch["x"][:, None]).square().flatten(1).sum(1)
        return losses * losses.flip(0) if batch["meet"].all() else losses

    x = numbers(4, 1)["x"][:, 0]
    batches = [{"x": x[:2], "meet": torch.tensor([0, 0])}, {"x": x[2:], "meet": torch.tensor([1, 1])}]
    if how == "Task":
        samples = [{"x": row, "meet": torch.tensor(int(place > 1))} for place, row in enumerate(x)]
        found = gradient_gram(model, probe_batches([Task("own", samples, loss=loss, batch_size=2)])[0], space="factor")
    else:
        found = gradient_gram(model, batches, loss, space="factor")
    expected = torch.cat([flat_gradients(model, batch, loss) for batch in batches])
    torch.testing.assert_close(found.gram["global"], expected @ expected.mT, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    """Powers of two scale exactly: no tolerance depends on the precision, and none lets anything through."""
    batch = {"x": numbers(6)["x"].to(dtype)}
    found = gradient_gram(Net(halves_swapped).to(dtype), batch, lambda m, b: squares(m, b).float())
    assert found.one_by_one == ()
    found = gradient_gram(Net(lambda x: x + 1e-2 * x.roll(1, 0)).to(dtype), batch, lambda m, b: squares(m, b).float())
    assert set(found.one_by_one) == {"first.weight", "first.bias"}


def test_kernels_that_do_not_repeat_themselves() -> None:
    """Sums in varying order differ by rounding: the rows are in order nevertheless, and samples that meet are told."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] * (1 + 1e-7 * torch.randn_like(gradients[0]))

    first = {"first.weight", "first.bias"}
    for between, slow in ((Noisy.apply, set()), (lambda x: Noisy.apply(x + x.roll(1, 0)), first)):
        apart, one_by_one = error(Net(between), numbers(5))
        assert apart < 1e-5
        assert set(one_by_one) == slow


def test_a_broken_sample_stays_alone() -> None:
    batch = numbers(4)
    batch["x"][2] = torch.nan
    found = gradient_gram(Net(torch.tanh), batch, squares, skip_broken=True)
    assert found.left_out == (2,)
    assert found.one_by_one == ()
