"""Run the study: all arms and seeds, then the analysis. What is done is not done again, so it can be stopped any time.

    python -m examples.imax.run --out runs/imax --smoke                # under two minutes
    python -m examples.imax.run --out runs/imax --pilot                # the gate: can the seven tasks be told apart?
    python -m examples.imax.run --out runs/imax --seeds 8 --jobs 2     # the study, over several sittings if need be

Every unit (one arm of one seed) is a process of its own with one thread; the base has two. ``OUT/ARM-SEED/scores.json``
says that a unit is complete; one that was stopped begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.imax.data import ARMS

#: Of a unit that did not end well, so many last lines are told.
LINES = 15
BASE_THREADS = 2  # nothing else runs meanwhile
#: The report is made of what is kept, and findings are for its reader: errors alone end the study.
QUIETLY = ("--no-report", "--no-progress")


def unit_command(what: str, seed: int, out: Path, *, smoke: bool) -> list[str]:
    """The command line that runs one unit, or teaches the base, in a process of its own."""
    command = [sys.executable, "-m", "examples.imax.run", "--out", str(out), "--unit", what, str(seed)]
    return [*command, "--smoke"] if smoke else command


def pending(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Units that are not complete, seed by seed, so that arms stay paired wherever the study is stopped."""
    wanted = [(name, seed) for seed in seeds for name in arms]
    return [(name, seed) for name, seed in wanted if not (out / f"{name}-{seed}" / "scores.json").exists()]


def run_process(command: Sequence[str], log: Path) -> None:
    """Run a command with one thread, its output in a file.

    Raises:
        RuntimeError: If it did not end well, with its last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as told:
        code = subprocess.run(command, stdout=told, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:])
        raise RuntimeError(f"Expected {log.stem} to end well, got exit status {code}; start again to resume.\n{last}")


def run_units(out: Path, arms: Sequence[str], seeds: Sequence[int], jobs: int, *, smoke: bool) -> None:
    """Teach the base unless it is there, then run what is pending, ``jobs`` at a time.

    Raises:
        RuntimeError: Of the first unit that did not end well; those under way are finished first.
    """
    if not (out / "base" / "taught.json").exists():
        print("base: teaching it to describe images", flush=True)
        run_process(unit_command("base", 0, out, smoke=smoke), out / "logs" / "base.log")

    def one(unit: tuple[str, int]) -> None:
        name, seed = unit
        run_process(unit_command(name, seed, out, smoke=smoke), out / "logs" / f"{name}-{seed}.log")
        print(f"{name}-{seed}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, unit) for unit in pending(out, arms, seeds)]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_unit(what: str, seed: int, out: Path, *, smoke: bool) -> None:
    """Teach the base, or train one arm of one seed, in this process."""
    import torch

    from examples.imax import stages
    from examples.imax.train import FULL, SMOKE, teach_base, unit

    torch.set_num_threads(BASE_THREADS if what == "base" else 1)

    size = SMOKE if smoke else FULL
    folder = out / ("base" if what == "base" else f"{what}-{seed}")
    shutil.rmtree(folder, ignore_errors=True)  # a stopped unit's rest
    folder.mkdir(parents=True)
    if what == "base":
        (folder / "taught.json").write_text(json.dumps(teach_base(folder, size)) + "\n", encoding="utf-8")
    elif what in stages.STRATEGIES:
        stages.unit(what, seed, out / "base", out / f"dmax-plain-{seed}", folder, size)
    else:
        unit(what, seed, out / "base", folder, size)


def analyse(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """``python -m dynamics.analyze imax=… dmax-plain=… … --scores …`` over all units, into ``OUT/analysis``.

    Raises:
        RuntimeError: If nothing could be analysed.
    """
    from examples.imax.summary import score_rows, write_table

    units = [(name, seed) for seed in seeds for name in arms]
    write_table(out / "scores.csv", score_rows(out, units))
    runs = [f"{name}={out / f'{name}-{seed}'}" for name, seed in units]
    command = [sys.executable, "-m", "dynamics.analyze", *runs, "--out", str(out)]
    run_process([*command, "--scores", str(out / "scores.csv"), *QUIETLY], out / "logs" / "analysis.log")


def main() -> None:
    """Read the command line, run, and say where the results are."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--seeds", type=int, default=8, help="paired seeds")
    parser.add_argument("--jobs", type=int, default=2, help="units at a time, one thread each")
    parser.add_argument("--stages", type=int, default=4, help="seeds of the three-stage strategy and of dmax-long")
    parser.add_argument("--smoke", action="store_true", help="a tiny study, to see that everything runs: one seed")
    parser.add_argument("--pilot", action="store_true", help="one unit, and whether every task passes the gate")
    parser.add_argument("--unit", nargs=2, metavar=("WHAT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.unit:
        run_unit(args.unit[0], int(args.unit[1]), args.out, smoke=args.smoke)
        return
    try:
        if args.pilot:
            sys.exit(_pilot(args.out, args.smoke))
        results = _study(args.out, *((1, 1) if args.smoke else (args.seeds, args.stages)), args.jobs, args.smoke)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"Results: {results}, with report.html")


def _pilot(out: Path, smoke: bool) -> int:
    from examples.imax.summary import pilot
    from examples.imax.train import PILOT_SEED

    run_units(out, ["imax"], [PILOT_SEED], 1, smoke=smoke)
    return pilot(out, out / f"imax-{PILOT_SEED}")


def _study(out: Path, seeds: int, stages: int, jobs: int, smoke: bool) -> Path:
    from examples.imax.keep import keep
    from examples.imax.stages import STRATEGIES
    from examples.imax.summary import write_results

    run_units(out, ARMS, range(seeds), jobs, smoke=smoke)
    run_units(out, STRATEGIES, range(min(stages, seeds)), jobs, smoke=smoke)
    analyse(out, ARMS, range(seeds))
    results = write_results(out, ARMS, range(seeds), STRATEGIES, range(min(stages, seeds)), out / "results")
    keep(out / "analysis", results, [f"{ARMS[0]}-0", f"{ARMS[1]}-0"])
    return results


if __name__ == "__main__":
    main()
