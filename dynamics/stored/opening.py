"""A run's stored result, wherever it lies."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import xarray as xr

from dynamics.store import FOLDER, RESULT, capture_path, read_tree, result_path
from dynamics.store.capture_reading import CAPTURE


def open_run(run: str | PathLike[str]) -> xr.DataTree:
    """Opens what is stored for a run: what its training captured, merged with what was analysed of its checkpoints.

    An analysis has the captured steps in it. They are merged anew, in memory, only if the capture store holds something
    else by now; so a training can be looked at while it runs.

    Args:
        run: A run folder with ``dynamics/analysis.zarr`` or ``dynamics/capture.zarr``, the folder that these are in, or
            one of the two, which is then opened without the other.

    Returns:
        The result tree; its layout is in ``dynamics.schema``. Arrays of an analysis are read when they are used.

    Raises:
        FileNotFoundError: If nothing is stored; the message has the command that makes it.
        ValueError: If the store does not open.

    Example: the effective rank of one matrix over the steps::

        tree = dynamics.open_run("runs/imax")
        tree["update"]["effective_rank_energy"].sel(kind="total", matrix="model.layers.0.self_attn.q_proj")
    """
    folder = Path(run)
    capture = capture_path(folder)
    result = None if capture == folder else result_path(folder)
    if result is None and capture is None:
        raise FileNotFoundError(
            f"No stored result for '{folder}' (looked for {RESULT} and {CAPTURE}, there and in {FOLDER}/). "
            f"Make one with: python -m dynamics.analyze {folder}"
        )
    if result is not None and (capture is None or result == folder):
        return read_tree(result)
    # Here, not above: reading a result must not wait for torch.
    from dynamics.stored.again import capture_alone, with_capture

    assert capture is not None
    return capture_alone(folder, capture) if result is None else with_capture(read_tree(result), capture)
