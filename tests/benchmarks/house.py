"""How long the ways through the code are, and how it names things: `python -m tests.benchmarks.house` prints a table.

Files count as executed where one of their functions runs while the result is made; imports do not count.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("dynamics", "probes")
#: Words that say nothing of what a variable holds.
PRONOUNS = frozenset(
    {"each", "found", "here", "own", "known", "place", "places", "again", "measured", "captured", "labelled"}
    | {"said", "told", "seen", "gone"}
)
#: File names that every room may have.
SHARED_NAMES = frozenset({"__init__", "dataset", "findings"})


def sources() -> list[Path]:
    """Return the product's files, without ``__init__.py``."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in files if path.name != "__init__.py")


def executed(action: Callable[[], object]) -> tuple[int, int]:
    """Return how many files of the product, and functions in them, an action runs."""
    codes = set()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = {str(path) for path in sources()}
    functions = {code for code in codes if code.co_filename in files and not code.co_name.startswith("<")}
    return len({code.co_filename for code in functions}), len(functions)


def uses_of_pronouns() -> Iterator[str]:
    """Yield each use of a pronoun as a name."""
    for path in sources():
        with path.open("rb") as file:
            tokens = tokenize.tokenize(file.readline)
            yield from (token.string for token in tokens if token.type == tokenize.NAME and token.string in PRONOUNS)


def public_names() -> Counter[str]:
    """Return in how many files each public function and class is defined.

    Plots are called after what they show, and each room has a ``findings_of``.
    """
    names: Counter[str] = Counter()
    for path in (path for path in sources() if "plot" not in path.parts):
        body = ast.parse(path.read_text()).body
        definitions = (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        names.update(
            {node.name for node in definitions if not node.name.startswith("_") and node.name != "findings_of"}
        )
    return names


def _analysis(folder: Path) -> object:
    import dynamics

    return dynamics.analyze_run(ROOT / "examples/runs/pydoc_lora", out=folder / "plain", report=False, device="cpu")


def _training(folder: Path) -> Callable[[], object]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    import dynamics
    import probes

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    tokens = torch.randint(0, 64, (24, 8))
    samples = [{"input_ids": row, "labels": row, "image": number // 2} for number, row in enumerate(tokens)]
    tasks = [probes.Task("a", samples[:8], group="image"), probes.Task("b", samples[8:16], group="image")]

    def train() -> None:
        model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-3)
        run = Path(tempfile.mkdtemp(dir=folder))
        with dynamics.Recorder(run, model, tasks=tasks, every=1) as recorder:
            for step in (1, 2):
                with recorder.step(step, optimizer):
                    model(input_ids=tokens[16:], labels=tokens[16:]).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

    return train


def _relation(folder: Path) -> Callable[[], object]:
    import dynamics
    from tests.runs import write_run

    runs = [write_run(folder / f"run-{seed}", seed=seed) for seed in range(4)]
    rows = [f"run-{seed},{step},vqa,{seed + step / 100}" for seed in range(4) for step in (10, 20)]
    (folder / "scores.csv").write_text("\n".join(["run,step,task,score", *rows]))
    return lambda: dynamics.analyze_run(
        runs, out=folder / "related", scores=[folder / "scores.csv"], report=False, device="cpu"
    )


def main() -> None:
    """Print the table."""
    lines = sum(len(path.read_text().splitlines()) for path in sources())
    stems = Counter(path.stem for path in sources() if "plot" not in path.parts and path.stem not in SHARED_NAMES)
    twice = [name for name, count in public_names().items() if count > 1]
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "one LoRA run, no report": lambda: _analysis(Path(folder)),
            "a batch to K, in a training": _training(Path(folder)),
            "scores to a sentence": _relation(Path(folder)),
        }
        for name, action in ways.items():
            action()  # what runs at the first import or call only is no part of the way
            files, functions = executed(action)
            print(f"{name:32} {files} files, {functions} functions")
    print(f"{'product':32} {lines:,} lines in {len(sources())} files")
    print(f"{'pronouns as names':32} {1000 * len(list(uses_of_pronouns())) / lines:.1f} per 1,000 lines")
    print(f"{'public names defined twice':32} {len(twice)}: {', '.join(sorted(twice))}")
    print(f"{'file names that occur twice':32} {', '.join(stem for stem, count in stems.items() if count > 1) or 0}")
    print(f"{'words in README':32} {len((ROOT / 'README.md').read_text().split()):,}")


if __name__ == "__main__":
    main()
