"""Settings for every test."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import gc
import inspect
import os
import random
import re
import sys
from collections.abc import Callable, Generator
from typing import Any

# Tests run side by side: threads of their own would only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping._storage import pop_shape_memo, push_shape_memo

# Beartype draws which items of a list it checks: from numbers of its own, since tests compare those of Python.
_of_beartype = random.Random(0).getrandbits
for _name, _module in list(sys.modules.items()):
    if _name.startswith("beartype.") and hasattr(_module, "getrandbits"):
        _module.getrandbits = _of_beartype

_by_jaxtyping = jaxtyping.jaxtyped
_by_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NAME = re.compile(r"(?<![\w.])[^\W\d]\w*")


def _checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check what jaxtyping checks, once: arguments and what is returned, with sizes of one name equal in all of them.

    jaxtyping itself binds the arguments of each call, and checks them twice, to say more in its message: a tenth of the
    time of all tests.
    """
    if function is None:
        return lambda decorated: _checked(decorated, typechecker=typechecker)
    if dataclasses.is_dataclass(function) and "__init__" in vars(function):
        function.__init__ = _checked(function.__init__, typechecker=typechecker)
        return function
    # Beartype's wrapper and a local function hold each other, and so the file that the function reads from.
    if not inspect.isfunction(function) or "<locals>" in function.__qualname__ or inspect.isgeneratorfunction(function):
        return _by_jaxtyping(function, typechecker=typechecker)
    annotations = " ".join(map(str, function.__annotations__.values()))
    names = set(_NAME.findall(_QUOTED.sub("", annotations)))
    # A name that is imported for type checkers alone, or defined later, is a thing that jaxtyping can leave out.
    named = [function.__globals__.get(name, getattr(builtins, name, jaxtyping)) for name in names]
    if any(value is jaxtyping for value in named):
        return _by_jaxtyping(function, typechecker=typechecker)
    if any(type(value).__module__.startswith("jaxtyping") for value in named):
        return _with_shapes(_by_beartype(function))
    return _by_beartype(function)


def _with_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forget after a call the sizes that names of axes stood for in it."""

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        push_shape_memo({})  # of the arguments, which an axis "{rank}" would ask for; there is none
        try:
            return function(*args, **kwargs)
        finally:
            pop_shape_memo()

    return within


jaxtyping.jaxtyped = _checked  # what the import hook of --jaxtyping-packages decorates with

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--seed``: what every test's random numbers start from. Tests should hold at any; CI takes the default."""
    parser.addoption("--seed", type=int, default=0, help="what each test's random numbers start from")


#: Files that take longest, in processor time. They come first, so that no worker ends with one of them alone.
LONGEST = (
    "test_recorder_distributed.py",
    "test_docs.py",
    "test_probing_ranks_training.py",
    "test_analyze.py",
    "test_checkpoint_probe_interventions.py",
    "test_analyze_scores.py",
    "test_page.py",
    "test_notebooks.py",
    "test_checkpoint_probe.py",
    "test_changes.py",
    "test_analyze_capture.py",
    "test_loss_probe.py",
    "test_callback_tasks.py",
    "test_tree_reopened.py",
    "test_examples_capture.py",
    "test_callback_truth.py",
    "test_callback_interventions.py",
    "test_figures.py",
    "test_train.py",
    "test_examples.py",
    "test_dataset.py",
    "test_sharded.py",
    "test_analyze_places.py",
    "test_score_comparison.py",
    "test_callback_guest.py",
    "test_analyze_base.py",
    "test_step_probes_sharpness.py",
    "test_counterfactuals.py",
    "test_trained.py",
    "test_pipeline_partial_results.py",
    "test_analyze_bad_input.py",
    "test_capture.py",
    "test_gradients_distributed.py",
    "test_projection_distributed.py",
    "test_conflicts.py",
    "test_path_over_trajectory.py",
    "test_callback_projected.py",
    "test_concentration_gradient_null.py",
    "test_interventions.py",
    "test_pipeline.py",
    "test_effects_calibration.py",
    "test_recorder_faults.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist: by the number of tests, the longest files would come last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what tests import out of all garbage collections: each training begins with one, once half its time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers for each test, whichever tests ran before it in the same process."""
    seed = item.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that draw from it
    torch.manual_seed(seed)


@pytest.hookimpl(trylast=True)  # after fixtures have gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave what a file's tests imported out of later garbage collections, too."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
