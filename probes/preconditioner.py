r"""What an optimizer makes of a gradient: the preconditioner P of its step, read from the state it is in.

Without momentum and weight decay a step is −P∇L. For Adam P is a number for each parameter, η/(1 − β₁ᵗ)/(√v̂ + ε); for
SGD it is the learning rate. Rates count relative to the largest one, so that P of plain SGD is 1. Muon orthogonalises:
its P is no linear map, and is applied to whole gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.sample_gradients import at_least_single
from probes.watched import is_sharded

State = Mapping[str, Any]
Group = Mapping[str, Any]
#: Why there is no preconditioner where nobody has given an optimizer.
NO_OPTIMIZER = "the optimizer is unknown"


@dataclass(frozen=True)
class Orthogonalisation:
    """Muon's step of one matrix: Newton–Schulz iteration towards the nearest orthogonal matrix, and its scale.

    Args:
        rate: Learning rate, relative, times Muon's adjustment for the shape.
        coefficients: a, b, c of X ← aX + (b XXᵀ + c (XXᵀ)²)X.
        steps: Of the iteration.
        eps: The norm is at least this.
    """

    rate: float
    coefficients: tuple[float, float, float]
    steps: int
    eps: float

    def __call__(self, gradient: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        """Return the step's direction, times the rate, in single precision at least (Muon iterates in bfloat16).

        >>> Orthogonalisation(1.0, (2.0, -1.5, 0.5), 12, 1e-7)(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).round().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        """
        a, b, c = self.coefficients
        tall = gradient.shape[0] > gradient.shape[1]
        x = at_least_single(gradient.mT if tall else gradient)
        x = x / x.norm().clamp(min=self.eps)
        for _ in range(self.steps):
            products = x @ x.mT
            x = a * x + (b * products + c * products @ products) @ x
        return self.rate * (x.mT if tall else x)


@dataclass(frozen=True)
class Preconditioner:
    """The preconditioner of an optimizer, by parameter. A parameter that it has not stepped yet does not move.

    Args:
        optimizer: Name of its class.
        constant: Parameter (by identity) → the number that P is for all of it.
        orthogonalised: Parameter → Muon's step of it.
        rules: Any other parameter → its P, read when asked for.
        counts: The same → how many equally weighted gradients its second moment is the mean of.
    """

    optimizer: str
    constant: Mapping[int, float] = field(default_factory=dict)
    orthogonalised: Mapping[int, Orthogonalisation] = field(default_factory=dict)
    rules: Mapping[int, Callable[[], Tensor | float]] = field(default_factory=dict)
    counts: Sequence[Callable[[], float]] = ()

    def of(self, parameter: nn.Parameter) -> Tensor | float | Orthogonalisation:
        """Return P of a parameter: of its shape, or one number for all of it, or Muon's."""
        key = id(parameter)
        if key in self.orthogonalised:
            return self.orthogonalised[key]
        return self.rules[key]() if key in self.rules else self.constant.get(key, 0.0)

    def steps(self, parameter: nn.Parameter) -> bool:
        """Return whether the optimizer has a parameter. If not, another one may step it."""
        return any(id(parameter) in known for known in (self.constant, self.orthogonalised, self.rules))

    @property
    def gradients(self) -> float:
        """How many gradients the second moments rest on, of the parameter with the fewest; NaN if there are none.

        Where they are few, the gradient of the last step is in them: it divides itself, as no fresh one would.
        """
        return min((count for read in self.counts if not math.isnan(count := read())), default=math.nan)

    def is_linear(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether P of these parameters is a linear map: not Muon's."""
        return not any(id(parameter) in self.orthogonalised for parameter in parameters)

    def is_plain(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether P leaves the gradients of these parameters as they are: plain SGD at the largest rate."""
        return all(self.constant.get(id(parameter)) == 1 for parameter in parameters)


def preconditioner_of(optimizer: Any) -> Preconditioner:
    """Return the preconditioner of an optimizer: rates as they are now, its state as it will be when P is read.

    Momentum and weight decay are no part of it, nor is what depends on the size of the whole gradient (Adafactor's
    clipping). NAdam and RAdam are as after bias correction. A parameter that has not been stepped yet does not move.

    Args:
        optimizer: One of torch's Adafactor, Adagrad, Adam, AdamW, Adamax, Muon, NAdam, RAdam, RMSprop and
            SGD, or transformers' Adafactor; or a wrapper that has it as ``.optimizer``.

    Raises:
        ValueError: Says why there is none: the optimizer is unknown or not one of these, or its state is sharded.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> preconditioner_of(torch.optim.SGD([weight], lr=0.1)).of(weight)
    1.0
    """
    if optimizer is None:
        raise ValueError(NO_OPTIMIZER)
    inner = optimizer
    while type(inner).__module__.split(".")[0] in ("accelerate", "deepspeed") and hasattr(inner, "optimizer"):
        if type(inner).__module__.startswith("deepspeed"):
            raise ValueError(f"the state of {type(inner).__name__} is divided over processes")
        inner = inner.optimizer
    name, package = type(inner).__name__, type(inner).__module__.split(".")[0]
    if (package, name) not in {("torch", "SGD"), ("torch", "Muon"), *_RULES}:
        raise ValueError(f"the preconditioner of {name} ({type(inner).__module__}) is unknown")
    groups = [dict(group) for group in inner.param_groups]
    parameters = [(parameter, group) for group in groups for parameter in group["params"]]
    if any(is_sharded(parameter) for parameter, _ in parameters):
        raise ValueError(f"the state of {name} is divided over processes")
    rates = [_rate(group) for group in groups]
    largest = max((rate for rate in rates if rate is not None), default=1.0)
    if largest <= 0:
        raise ValueError(f"the learning rate of {name} is 0 at this step")
    constant, orthogonalised, rules, counts = {}, {}, {}, []
    for parameter, group in parameters:
        rate = 1.0 if (stated := _rate(group)) is None else stated / largest
        if name == "SGD":
            constant[id(parameter)] = rate
        elif name == "Muon":
            orthogonalised[id(parameter)] = _orthogonalisation(rate, group, parameter.shape)
        else:
            rules[id(parameter)] = partial(_read, _RULES[package, name], inner, parameter, group, rate)
            counts.append(partial(_count, name, inner, parameter, group))
    return Preconditioner(name, constant, orthogonalised, rules, counts)


def _rate(group: Group) -> float | None:
    """Return a group's learning rate, ``None`` where the optimizer's rule has its own (transformers' Adafactor)."""
    own = group.get("relative_step", False) or group.get("lr") is None
    return None if own else _number(group["lr"])


def _read(
    rule: Callable[..., Tensor | float], optimizer: Any, parameter: nn.Parameter, group: Group, rate: float
) -> Tensor | float:
    state = optimizer.state.get(parameter)
    return rule(state, group, parameter) * rate if state else 0.0


def _count(name: str, optimizer: Any, parameter: nn.Parameter, group: Group) -> float:
    """Return (Σw)²/Σw² of the weights of squared gradients in the second moment; NaN before the first."""
    state = optimizer.state.get(parameter)
    if not state or (step := _number(state["step"])) < 1:
        return math.nan
    if name == "Adafactor":
        return _growing_window(int(step), float(group.get("beta2_decay", group.get("decay_rate"))))
    decay = _number(group["betas"][1]) if "betas" in group else _number(group.get("alpha", 1.0))
    if name == "Adamax":  # a maximum: the present gradient's with a probability of one over the number that count
        return min(step, 1 / (1 - decay) if decay < 1 else step)
    kept = decay**step
    return step if decay >= 1 else (1 - kept) * (1 + decay) / ((1 - decay) * (1 + kept))


@lru_cache
def _growing_window(steps: int, exponent: float) -> float:
    """Return (Σw)²/Σw² of an average that takes in the t-th value with the weight t^exponent, after so many steps.

    >>> _growing_window(1, -0.8), round(_growing_window(10, -0.8), 3)
    (1.0, 8.79)
    """
    taken = np.arange(1, steps + 1, dtype=np.float64) ** exponent
    left = np.append(np.cumprod((1 - taken)[:0:-1])[::-1], 1.0)  # of each value by those that follow it
    return float(1 / ((taken * left) ** 2).sum())


def _orthogonalisation(rate: float, group: Group, shape: torch.Size) -> Orthogonalisation:
    rows, columns = shape
    adjusted = math.sqrt(max(1, rows / columns))
    if group["adjust_lr_fn"] == "match_rms_adamw":
        adjusted = 0.2 * math.sqrt(max(rows, columns))
    a, b, c = map(float, group["ns_coefficients"])
    return Orthogonalisation(rate * adjusted, (a, b, c), int(group["ns_steps"]), float(group["eps"]))


def _adam(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    second = at_least_single(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    first_bias, second_bias = _bias_corrections(state, group)
    return 1 / ((second / second_bias).sqrt() + group["eps"]) / first_bias


def _nadam(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    _, second_bias = _bias_corrections(state, group)
    return 1 / ((at_least_single(state["exp_avg_sq"]) / second_bias).sqrt() + group["eps"])


def _radam(state: State, group: Group, parameter: nn.Parameter) -> Tensor | float:
    step, beta = _number(state["step"]), _number(group["betas"][1])
    first_bias, second_bias = _bias_corrections(state, group)
    largest = 2 / (1 - beta) - 1
    length = largest - 2 * step * beta**step / second_bias
    if length <= 5:
        return 1 / first_bias
    rectified = (length - 4) * (length - 2) * largest / ((largest - 4) * (largest - 2) * length)
    denominator = at_least_single(state["exp_avg_sq"]).sqrt() + group["eps"]
    return math.sqrt(rectified * second_bias) / first_bias / denominator


def _adamax(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    return 1 / at_least_single(state["exp_inf"]) / _bias_corrections(state, group)[0]


def _adagrad(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    decay = 1 + (_number(state["step"]) - 1) * group["lr_decay"]
    return 1 / (at_least_single(state["sum"]).sqrt() + group["eps"]) / decay


def _rmsprop(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    squares = at_least_single(state["square_avg"])
    if group["centered"]:
        squares = squares - at_least_single(state["grad_avg"]).square()
    return 1 / (squares.sqrt() + group["eps"])


def _adafactor(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    smallest, least = group["eps"]
    smallest = torch.finfo(parameter.dtype).eps if smallest is None else smallest
    if "variance" in state:
        squares = at_least_single(state["variance"])
    else:
        rows, columns = at_least_single(state["row_var"]), at_least_single(state["col_var"])
        squares = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=smallest)
    rate = _number(group["lr"])
    step = min(rate, _number(state["step"]) ** -0.5) / rate
    size = max(least, float(parameter.detach().double().square().mean().sqrt()))
    return squares.clamp(min=smallest**2).rsqrt() * (step * size)


def _transformers_adafactor(state: State, group: Group, parameter: nn.Parameter) -> Tensor:
    if "exp_avg_sq" in state:
        factor = at_least_single(state["exp_avg_sq"]).rsqrt()
    else:
        rows, columns = at_least_single(state["exp_avg_sq_row"]), at_least_single(state["exp_avg_sq_col"])
        factor = (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
    step, rate = _number(state["step"]), 1.0
    if group["relative_step"]:
        rate = min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
    if group["scale_parameter"]:
        rate *= max(group["eps"][1], _number(state["RMS"]))
    return factor * rate


#: Elementwise P without its rate, by the package and the name of the class: a subclass may do anything.
_RULES: Mapping[tuple[str, str], Callable[..., Tensor | float]] = {
    ("torch", "Adam"): _adam,
    ("torch", "AdamW"): _adam,
    ("torch", "NAdam"): _nadam,
    ("torch", "RAdam"): _radam,
    ("torch", "Adamax"): _adamax,
    ("torch", "Adagrad"): _adagrad,
    ("torch", "RMSprop"): _rmsprop,
    ("torch", "Adafactor"): _adafactor,
    ("transformers", "Adafactor"): _transformers_adafactor,
}


def _number(value: Any) -> float:
    """Return a number that may be a tensor, as rates and steps are for a captured graph."""
    return float(value)


def _bias_corrections(state: State, group: Group) -> tuple[float, float]:
    step = _number(state["step"])
    first, second = (1 - _number(beta) ** step for beta in group["betas"])
    return first, second
