"""Every code block of README and docs runs, page by page, in a folder with the runs and models that the page names."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from typer.testing import CliRunner

import dynamics
import probes
from tests.mixtures import batch, loss, mixture
from tests.runs import VOCABULARY, Tokens, llama, lora_llama, trainer, write_run
from tests.whole_models import model_tensors, write_dense_run, write_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULE = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file, not a program


# ---- what blocks of each language do ----


class Block:
    """Finds the fenced blocks of one language and evaluates them with a function."""

    def __init__(self, language: str, evaluate: Callable[[Example], Any]) -> None:
        self._lexer, self._evaluate = FencedCodeBlockLexer(language), evaluate

    def __call__(self, document: Document) -> Iterator[Region]:
        for region in self._lexer(document):
            yield Region(region.start, region.end, region.lexemes["source"], self._evaluate)


def run_python(example: Example) -> None:
    if name := MODULE.match(example.parsed):
        Path(name[1]).write_text(example.parsed)
    else:
        PythonEvaluator()(example)


def run_shell(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        run_command(*shlex.split(line, comments=True))


def run_command(*words: str) -> None:
    match words:
        case ["python", "-m", "dynamics.analyze", *arguments]:
            from dynamics.analyze import app

            drawn = [] if "examples/runs/pydoc_lora" in arguments else ["--no-report"]  # one page is drawn, not six
            result = CliRunner().invoke(app, [*arguments, *drawn])
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
        case ["python", "-m", "pip", "install", *arguments]:
            assert set(re.findall(r"[\w-]+(?=[],])", arguments[-1])) <= extras(), "an extra that pyproject.toml lacks"
        # Benchmarks take minutes, and examples run in their own tests: both are only asked what they can do.
        case ["python", "-m", module, *arguments]:
            assert_asked(runpy.run_module, module, arguments)
        case ["python", script, *arguments]:
            assert_asked(runpy.run_path, script, arguments)
        case _:
            pytest.fail(f"The docs have a command that no test runs: {shlex.join(words)}")


def assert_asked(run: Callable[..., Any], program: str, arguments: list[str]) -> None:
    """The program takes these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            run(program, run_name="__main__")


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


# ---- what each page finds in its folder and its names ----


def batches() -> list[dict[str, torch.Tensor]]:
    rows = torch.stack([Tokens()[index]["input_ids"] for index in range(8)])
    return [{"input_ids": rows, "labels": rows}] * 2


def samples(task: str, count: int = 8) -> list[dict[str, Any]]:
    """Two samples of each image, not trained on."""
    rows = torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(len(task)))
    return [{"input_ids": row, "labels": row, "image": f"image-{i // 2}"} for i, row in enumerate(rows)]


def training() -> dict[str, Any]:
    model = lora_llama()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    return {
        "model": model,
        "data": Tokens(),
        "loader": batches(),
        "optimizer": optimizer,
        "loss": lambda model, batch: model(**batch).loss,
    }


def probed_run() -> dict[str, Any]:
    """A run with its base model, and a module `my_data` with tasks of the user's."""
    llama().save_pretrained("models/base")
    trainer(Path("runs/vqa")).train()
    Path("my_data.py").write_text(
        "from probes import Task\nfrom tests.test_docs import samples\n\n"
        "tasks = [Task('report', samples('report'), group='image'), Task('vqa', samples('vqa'), group='image')]\n"
    )
    return {**training(), "reports": samples("report"), "questions": samples("vqa")}


def run_to_take_apart() -> dict[str, Any]:
    """The same, and the module that loads a model at a checkpoint."""
    Path("my_module.py").write_text(
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\nfrom my_data import tasks\n\n\n"
        "def load(folder):\n"
        "    base = AutoModelForCausalLM.from_pretrained('models/base')\n"
        "    return PeftModel.from_pretrained(base, folder, is_trainable=True), tasks\n"
    )
    return probed_run()


def whole_models() -> dict[str, Any]:
    write_model(Path("models/base"), model_tensors(seed=9))
    write_dense_run(Path("runs/full"), (10, 20, 30))
    return {}


def runs_with_scores(*names: str) -> dict[str, Any]:
    """Runs and their scores, and both as tables of a user's own."""
    for seed, name in enumerate(names):
        write_run(Path("runs") / name, seed=seed)
    rng = np.random.default_rng(0)
    coords = {"run": list(names), "step": [10, 20, 30]}
    shape = (len(names), 3, 1)
    scores = xr.DataArray(rng.random(shape), {**coords, "task": ["vqa/accuracy"]}, ("run", "step", "task"))
    table = scores.to_series().rename("score").reset_index()
    table.to_csv("scores.csv", index=False, columns=["run", "step", "task", "score"])
    rank = xr.DataArray(rng.random(shape[:2]), coords, ("run", "step"))
    return {"measures": xr.Dataset({"stable_rank": rank}), "scores": scores}


def two_recipes() -> dict[str, Any]:
    """Two recipes of two seeds each."""
    return runs_with_scores("imax_s1", "imax_s2", "dmax_s1", "dmax_s2")


def readme() -> dict[str, Any]:
    """A model to train, whole models with their base, and four runs with scores."""
    whole_models()
    runs_with_scores("a", "b", "c", "d")
    return training()


def first_guess(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Score whether the first token predicts the second one."""
    return (model(**batch).logits[:, 0].argmax(-1) == batch["labels"][:, 1]).float()


def results() -> dict[str, Any]:
    """A result of a recorded training, one of whole models, and relations of two recipes."""
    whole_models()
    tables = two_recipes()
    tasks = [probes.Task(task, samples(task), group="image", score=first_guess) for task in ("report", "vqa")]
    training = trainer(Path("runs/probed"), [dynamics.DynamicsCallback("runs/probed", tasks, intervene=[4])])
    training.train()
    groups = {"imax": ["imax_s1", "imax_s2"], "dmax": ["dmax_s1", "dmax_s2"]}
    of_runs = {"headline": "stable_rank"}
    options = {"intruders": True, "weights": True, "report": False}
    tree = dynamics.open_run("runs/probed")
    tree["sensitivity"] = xr.DataTree(dynamics.sensitivity(training.model, tasks))
    tree["sharpness"] = xr.DataTree(dynamics.critical_sharpness(training.model, tasks))
    model = mixture("mixtral")
    with dynamics.Recorder("runs/mixture", model, every=1) as recorder, recorder.step(1):
        loss(model, batch(model)).backward()
    tree["routing"] = dynamics.open_run("runs/mixture")["routing"]
    return {
        "tree": tree,
        "full": dynamics.analyze_run("runs/full", base="models/base", **options),
        "study": {
            "association": dynamics.associate(tables["measures"], tables["scores"], **of_runs),
            "comparison": dynamics.compare(tables["measures"], groups, **of_runs),
            "score_comparison": dynamics.compare_scores(tables["scores"], groups),
        },
    }


SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "recording.md": training,
    "informative-directions.md": probed_run,
    "interventions.md": run_to_take_apart,
    "full-fine-tuning.md": whole_models,
    "comparing-runs.md": two_recipes,
    "measures.md": results,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A clone's examples in a folder of their own, as the place where commands are run."""
    left_out = shutil.ignore_patterns("dynamics", "imax", "__pycache__")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=left_out)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    plt.close("all")
    for module in ("my_module", "my_data"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_its_code_runs(name, folder):
    page = ROOT / name
    document = Document.parse(str(page), Block("python", run_python), Block("shell", run_shell))
    document.namespace.update(SETUPS.get(page.name, dict)())
    for example in document.examples():
        example.evaluate()


def test_every_block_is_in_a_language_that_runs():
    for page in PAGES:
        languages = re.findall(r"^```(.*)\n(?:.*\n)*?```$", page.read_text(), re.MULTILINE)
        assert set(languages) <= {"python", "shell", "text"}, page.name


def test_every_public_name_has_a_place_in_the_api_pages():
    """A function whose module has its name is found by its whole path; its heading is the public name."""
    for package, page in ((dynamics, "dynamics"), (probes, "probes"), (dynamics.plot, "plot")):
        text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
        listed = [
            heading or path
            for path, heading in re.findall(
                r"^::: ([\w.]+)\n?(?:    options: .*heading: ([\w.]+) }$)?", text, re.MULTILINE
            )
        ]
        elsewhere = {"dynamics.__version__", "dynamics.plot"}
        names = {f"{package.__name__}.{name}" for name in package.__all__} - elsewhere
        assert sorted(listed) == sorted(names), page
