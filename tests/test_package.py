"""What the packages promise by their names: documented, typed, cheap to import, and loud when wrong."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import dynamics
import probes
from dynamics.spectra import dense

ROOT = Path(__file__).parents[1]
PUBLIC = [(package, name) for package in (dynamics, probes) for name in package.__all__ if name != "__version__"]
each_public_name = pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])


@each_public_name
def test_documented(package, name):
    assert len(inspect.getdoc(getattr(package, name)) or "") > 60


@each_public_name
def test_shown_by_an_example(package, name):
    text = inspect.getdoc(getattr(package, name)) or ""
    assert name == "plot" or ">>>" in text or "Example:" in text


@each_public_name
def test_typed(package, name):
    thing = getattr(package, name)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())


@each_public_name
def test_few_positional_parameters(package, name):
    thing = getattr(package, name)
    if inspect.isfunction(thing):
        kinds = [each.kind for each in inspect.signature(thing).parameters.values()]
        # What an update is taken apart with has four parts: the model, its samples, their K, and the update.
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= (4 if name == "counterfactuals" else 3)


@pytest.mark.parametrize("name", dynamics.plot.__all__)
def test_plots_take_data_and_keywords(name):
    function = getattr(dynamics.plot, name)
    first, *rest = inspect.signature(function).parameters.values()
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in rest)


def test_importing_is_cheap():
    script = "import sys, dynamics; dir(dynamics); print({'torch', 'numpy', 'matplotlib', 'xarray'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "set()\n"


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match=re.escape("module 'dynamics' has no attribute 'svd'")):
        dynamics.svd  # noqa: B018


def test_every_dependency_has_its_reason():
    block = re.search(r"\ndependencies = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert block
    for line in block[1].splitlines():
        assert re.fullmatch(r'    "[a-z0-9]+>=[\d.]+", +# .{15,}', line), line


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    text = (ROOT / "pyproject.toml").read_text()
    asked = set(re.findall(r'^    "([A-Za-z0-9-]+)>=', text, re.MULTILINE)) - {"setuptools", "gradience"}
    assert {name.lower() for name in asked} <= pinned


def test_readme_has_exactly_two_commands_that_set_up():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "dynamics.analyze examples/runs/" in commands[0]
    assert "pytest" in commands[1]


@jaxtyping.jaxtyped(typechecker=beartype)  # what the import hook does to every function
def turned(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return matrix.mT


def test_shapes_are_checked_while_tests_run():
    """In one argument, in all of them, and in what is returned; sizes are forgotten after a call."""
    with pytest.raises(TypeCheckError):
        dense._from_gram(torch.ones(2, 3))
    with pytest.raises(TypeCheckError):
        dense._plus_products(torch.ones(2, 2), torch.ones(3, 4))
    with pytest.raises(TypeCheckError):
        turned(torch.ones(2, 3))
    assert [len(turned(torch.ones(size, size))) for size in (2, 3)] == [2, 3]
