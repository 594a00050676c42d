"""Of which families of mixtures in transformers the routing is read, and how: a table.

python -m tests.benchmarks.routers [FAMILY ...]
"""

from __future__ import annotations

import sys

from probes.routers import Routing
from probes.watched import find
from tests.mixtures import FAMILIES, batch, loss, mixture


def row(family: str) -> str:
    """Return a line of the table."""
    model = mixture(family)
    routing = Routing(model)
    routing.arm()
    loss(model, batch(model)).backward()
    routing.disarm()
    sums = routing.take()
    ways = {one.layout.way for one in routing.mixtures if one.layout is not None}
    names = [watched.name for watched in find(model).watched]
    experts = [name for name, parameter in model.named_parameters() if "experts" in name and parameter.ndim > 1]
    unwatched = [name for name in experts if not any(one.startswith(name.removesuffix(".weight")) for one in names)]
    without = sorted(set(routing.unread().values()))
    watched = "all" if not unwatched else f"without {', '.join(unwatched[:2])}"
    return f"| {family} | {len(sums)} | {', '.join(sorted(ways)) or '–'} | {watched} | {'; '.join(without) or '–'} |"


if __name__ == "__main__":
    print("| family | layers | read from | experts' weights | not read |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or FAMILIES:
        try:
            print(row(name), flush=True)
        except Exception as error:  # the table goes on
            print(f"| {name} | FAILED | {type(error).__name__}: {str(error)[:150]} | | |", flush=True)
