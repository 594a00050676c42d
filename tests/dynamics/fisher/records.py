"""Raw Fisher records as a captured training makes them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from tests.dynamics.fisher.simulated import gradients, power_law

BLOCKS = ("layers.0", "layers.1", "global")


def record(steps=3, samples=24, directions=12, batch_size=8, space="tangent", seed=0, mean=0.3) -> xr.Dataset:
    """Two blocks and their sum, two tasks in groups of two; the first step has no predecessor."""
    rng = np.random.default_rng(seed)
    rows = np.stack([gradients(rng, steps, samples, power_law(directions), mean) for _ in range(2)], axis=1)
    update = rng.standard_normal((steps, 2, directions))
    gram = rows @ rows.swapaxes(-1, -2)
    product = np.einsum("sbnd,sbd->sbn", rows, update)
    norm = (update**2).sum(-1)
    gram, product, norm = (np.concatenate([part, part.sum(1, keepdims=True)], axis=1) for part in (gram, product, norm))
    product[0], norm[0] = np.nan, np.nan
    per_block = ("step", "block")
    return xr.Dataset(
        {
            "gram": ((*per_block, "sample", "sample_"), gram),
            "update_product": ((*per_block, "sample"), product),
            "update_norm_squared": (per_block, norm),
            "share_outside_space": (per_block, np.where(np.isnan(norm), np.nan, 0.02)),
            "dimension": (per_block, np.tile([directions, directions, 2.0 * directions], (steps, 1))),
            "loss": (("step", "sample"), rng.uniform(1, 2, (steps, samples))),
        },
        coords={
            "step": np.arange(steps) * 10,
            "block": list(BLOCKS),
            "evaluated_at_step": ("step", np.maximum(np.arange(steps) * 10 - 10, 0)),
            "sample_task": ("sample", np.array(["caption", "vqa"])[np.arange(samples) // (samples // 2)]),
            "sample_group": ("sample", [f"image {i // 2}" for i in range(samples)]),
            "sample_id": ("sample", [str(i) for i in range(samples)]),
        },
        attrs={"space": space, "fisher": "empirical", "unit": "sequence", "reduction": "sum", "batch_size": batch_size},
    )
