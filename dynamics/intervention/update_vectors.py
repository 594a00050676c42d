"""Changes of a model's matrices as vectors of one space: norms, products, sums, and some parts of them.

A change is name → low-rank or dense matrix (or vector); low-rank ones are never multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dynamics.schema.checks import layer_and_role
from dynamics.spectra.increments import difference
from probes.blocks import Block, find_blocks, trained_parameters
from probes.low_rank import LowRankMatrix
from probes.singular_directions import singular_directions
from probes.spaces import TangentSpace, change_energy
from probes.watched import AdapterProduct, Dense, Matrix, Reading, find

Change = Mapping[str, Matrix]


def energy(change: Change) -> float:
    """Return ‖δ‖².

    >>> energy({"a": torch.ones(2, 2), "b": LowRankMatrix(torch.ones(1, 1), torch.ones(1, 1), 2.0)})
    8.0
    """
    return sum((change_energy(matrix) for matrix in change.values()), 0.0)


def inner(one: Change, other: Change) -> float:
    """Return ⟨one, other⟩; what only one has adds nothing.

    >>> inner({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.tensor([1.0, 2.0])})
    3.0
    """
    return sum((_inner(one[name], other[name]) for name in one if name in other), 0.0)


def _inner(one: Matrix, other: Matrix) -> float:
    if isinstance(one, LowRankMatrix) and isinstance(other, LowRankMatrix):
        left, right = one.left.mT @ other.left.to(one.left.device), one.right @ other.right.mT.to(one.right.device)
        return float((left * right).sum())
    if isinstance(one, LowRankMatrix) or isinstance(other, LowRankMatrix):
        thin, dense = (one, other) if isinstance(one, LowRankMatrix) else (other, one)
        assert isinstance(thin, LowRankMatrix)
        assert isinstance(dense, Tensor)
        return float(((thin.left.mT @ dense.to(thin.left)) * thin.right).sum())
    return float((one.to(torch.float64) * other.to(one.device, torch.float64)).sum())


def weighted_sum(terms: Sequence[tuple[float, Change]]) -> dict[str, Matrix]:
    """Return Σ c·change. Sums of low-rank matrices are low-rank, of the sum of the ranks; on the first one's device.

    >>> weighted_sum([(2.0, {"a": torch.ones(1)}), (-1.0, {"a": torch.ones(1), "b": torch.ones(1)})])
    {'a': tensor([1.]), 'b': tensor([-1.])}
    """
    names = dict.fromkeys(name for _, change in terms for name in change)
    return {name: _weighted_sum([(c, change[name]) for c, change in terms if name in change]) for name in names}


def _weighted_sum(terms: Sequence[tuple[float, Matrix]]) -> Matrix:
    device = _device(terms[0][1])
    if all(isinstance(matrix, LowRankMatrix) for _, matrix in terms):
        columns: list[Tensor] = []
        rows: list[Tensor] = []
        scales: list[Tensor] = []
        for c, matrix in terms:
            assert isinstance(matrix, LowRankMatrix)
            columns.append(matrix.left_factor.detach().to(device))
            rows.append(matrix.right_factor.detach().to(device))
            scales.append(c * matrix.scales().cpu())
        dtype = max((part.dtype for part in (*columns, *rows)), key=lambda dtype: -torch.finfo(dtype).eps)
        return LowRankMatrix(
            torch.cat([part.to(dtype) for part in columns], 1),
            torch.cat([part.to(dtype) for part in rows]),
            column_scale=torch.cat(scales),
        )
    dense = [c * (m.to_dense() if isinstance(m, LowRankMatrix) else m).to(device) for c, m in terms]
    return torch.stack(torch.broadcast_tensors(*dense)).sum(0) if len(dense) > 1 else dense[0]


def sigma_top(change: Change, k: int) -> dict[str, Matrix]:
    """Return the k leading singular directions of each matrix; vectors have none and are left out.

    >>> sigma_top({"a": torch.diag(torch.tensor([3.0, 2.0])), "b": torch.ones(2)}, 1)["a"].to_dense().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    top: dict[str, Matrix] = {}
    for name, matrix in change.items():
        if isinstance(matrix, LowRankMatrix):
            directions = singular_directions(matrix)
            top[name] = directions.part(torch.arange(len(directions.values)) < k)
        elif matrix.ndim == 2:
            vectors, values, turned = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
            top[name] = LowRankMatrix(vectors[:, :k] * values[:k], turned[:k])
    return top


def of_layer(change: Change, arm: str) -> dict[str, Matrix]:
    """Return the matrices of one layer (``layer:3``), one matrix (``layer:NAME``), or all others (``without_layer:…``).

    Raises:
        ValueError: If there is no such layer.

    >>> list(of_layer({"layers.0.q": torch.ones(1), "layers.1.q": torch.ones(1)}, "without_layer:0"))
    ['layers.1.q']
    """
    kind, _, layer = arm.partition(":")
    inside = [name for name in change if name == layer or str(layer_and_role(name)[0]) == layer]
    if not inside:
        layers = sorted({layer_and_role(name)[0] for name in change})
        raise ValueError(f"Expected a layer among {', '.join(map(str, layers))}, or a matrix, got {layer!r}.")
    return {name: matrix for name, matrix in change.items() if (name in set(inside)) == (kind == "layer")}


def random_change(model: nn.Module, change: Change, space: str, seed: int) -> dict[str, Matrix]:
    """Return a random direction of the space, isotropic, orthogonal to a change, of norm 1.

    Args:
        model: At the weights where the change began.
        change: In the space ``space``.
        space: ``"tangent"`` or ``"factor"``.
        seed: Of the direction.
    """
    generator = torch.Generator().manual_seed(seed)
    # In the space's own coordinates: there, what the change has outside does not count.
    drawn: dict[str, Tensor] = {}
    inside: dict[str, Tensor] = {}
    spaces = {block.name: block for block in find_blocks(model, space).chosen} if space == "tangent" else {}
    for name, matrix in change.items():
        tangent = _tangent(spaces.get(name))
        if tangent is None:
            inside[name] = _dense(matrix).detach().cpu()
            drawn[name] = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        else:
            inside[name] = tangent.of_change(matrix).cpu()
            numbers = torch.randn(tangent.numbers, generator=generator, dtype=torch.float64).to(tangent.left.device)
            drawn[name] = tangent.of_change(tangent.to_matrix(numbers)).cpu()
    size = sum(float(values.square().sum()) for values in inside.values())
    along = sum(float((drawn[name] * values).sum()) for name, values in inside.items()) / size if size > 0 else 0.0
    apart = {name: values - along * inside[name] for name, values in drawn.items()}
    norm = sum(float(values.square().sum()) for values in apart.values()) ** 0.5
    direction: dict[str, Matrix] = {}
    for name, values in apart.items():
        tangent, device = _tangent(spaces.get(name)), _device(change[name])
        unit = (values / norm).to(device) if norm > 0 else values.to(device)
        dtype = torch.promote_types(_format(change[name]), torch.float32)
        direction[name] = unit.to(dtype) if tangent is None else tangent.to_matrix(unit, dtype)
    return direction


def _tangent(block: Block | None) -> TangentSpace | None:
    return None if block is None else block.tangent


def _device(matrix: Matrix) -> torch.device:
    return matrix.left_factor.device if isinstance(matrix, LowRankMatrix) else matrix.device


def _format(matrix: Matrix) -> torch.dtype:
    return matrix.left_factor.dtype if isinstance(matrix, LowRankMatrix) else matrix.dtype


def in_format(model: nn.Module, change: Change, dtype: torch.dtype) -> dict[str, Matrix]:
    """Return a change in a format, each matrix on the device of the model's own.

    Raises:
        ValueError: If the model has no such matrix or trained parameter.

    >>> in_format(nn.Linear(1, 1), {"weight": torch.ones(1, 1)}, torch.float64)["weight"].dtype
    torch.float64
    """
    devices = {name: parameter.device for name, parameter in trained_parameters(model).items()}
    devices |= {watched.name: watched.sources[0].device for watched in find(model).watched}
    if unknown := [name for name in change if name not in devices]:
        raise ValueError(f"Expected changes of matrices, such as {sorted(devices)[:3]}, got {unknown[:3]}.")
    converted: dict[str, Matrix] = {}
    for name, matrix in change.items():
        if isinstance(matrix, LowRankMatrix):
            left, right = (part.detach().to(devices[name], dtype) for part in (matrix.left_factor, matrix.right_factor))
            converted[name] = LowRankMatrix(left, right, matrix.scale, column_scale=matrix.column_scale)
        else:
            converted[name] = matrix.detach().to(devices[name], dtype)
    return converted


def as_matrices(model: nn.Module, change: Change, space: str) -> dict[str, Matrix]:
    """Return a change of parameters (in factor space) as changes of matrices, and of other parameters by name.

    For factors B + dB, A + dA it is s(B dA + dB (A + dA)), of rank 2r, without cancellation.
    """
    if space != "factor":
        return dict(change)
    names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
    matrices: dict[str, Matrix] = {}
    used: set[str] = set()
    for watched in find(model).watched:
        if watched.part_of or isinstance(watched.terms, Dense):
            continue
        moved = {id(p): names[id(p)] for p in watched.parameters if names.get(id(p)) in change}
        if not moved:
            continue
        used |= {*moved.values()}

        def after(parameter: nn.Parameter, moved: Mapping[int, str] = moved) -> Tensor:
            value = parameter.detach().to(torch.float64)
            part = change[moved[id(parameter)]] if id(parameter) in moved else None
            return value if part is None else value + _dense(part).to(value)

        matrices[watched.name] = _weighted_sum(_differences(watched.terms, after))
    return matrices | {name: matrix for name, matrix in change.items() if name not in used}


def _differences(products: Iterable[AdapterProduct], after: Reading) -> list[tuple[float, Matrix]]:
    before = lambda parameter: parameter.detach().to(torch.float64)  # noqa: E731
    return [(1.0, difference(product.matrix(after), product.matrix(before))) for product in products]


def _dense(matrix: Matrix) -> Tensor:
    return matrix.to_dense() if isinstance(matrix, LowRankMatrix) else matrix.to(torch.float64)
