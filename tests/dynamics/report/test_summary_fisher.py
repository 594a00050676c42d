import json

import numpy as np
import pytest

from dynamics.report import summarise
from dynamics.report.summary import fisher_summary
from dynamics.store import encodable_dataset, read_tree, write_tree
from tests.fishers import BLOCKS, MEANS, with_fisher
from tests.trees import example_tree


def strict(summary):
    """Through JSON and back, which knows neither NaN nor infinity."""
    return json.loads(json.dumps(summary, allow_nan=False))


@pytest.fixture(scope="module")
def tree():
    return with_fisher(example_tree(3, 2))


@pytest.fixture(scope="module")
def summary(tree):
    return fisher_summary(tree)


def ends(dataset, name, suffix=""):
    return {
        word: float(dataset[f"{name}{end}{suffix}"])
        for word, end in (("value", ""), ("low", "_low"), ("high", "_high"))
    }


def test_it_is_a_key_of_the_summary_and_survives_json(tree, summary):
    assert summarise(tree)["fisher"] == summary == strict(summary)


def test_it_is_the_same_from_the_store(tree, summary, tmp_path):
    groups = {f"/{name}": encodable_dataset(tree[name].to_dataset()) for name in ("fisher", "concentration", "tasks")}
    write_tree(type(tree).from_dict(groups), tmp_path / "result.zarr")
    assert fisher_summary(read_tree(tmp_path / "result.zarr")) == summary


def test_says_what_was_measured(summary):
    said = {name: summary[name] for name in ("step", "evaluated_at_step", "space", "fisher", "samples", "groups")}
    assert said == {
        "step": 300,
        "evaluated_at_step": 299,
        "space": "tangent",
        "fisher": "empirical",
        "samples": 40,
        "groups": 40,
    }


def test_numbers_are_the_results_own_at_the_last_step(tree, summary):
    last = tree["fisher"].to_dataset().sel(block="global", step=300)
    for name in ("dominant_ratio", "participation_ratio", "participation_ratio_directional"):
        assert summary[name] == ends(last.sel(task="all"), name)
    bound = float(last["ln_participation_ratio_low"].sel(task="all"))
    assert summary["spectral_entropy"] == ends(last.sel(task="all"), "spectral_entropy") | {"lower_bound": bound}
    for name in ("effective_groups", "largest_samples_share"):
        assert summary[name] == float(last[name].sel(task="all"))
    assert list(summary["by_task"]) == list(MEANS)
    chart = last.sel(task="chart")
    assert summary["by_task"]["chart"] == {
        "samples": 10,
        "groups": 10,
        "participation_ratio": ends(chart, "participation_ratio"),
        "participation_ratio_directional": ends(chart, "participation_ratio_directional"),
        "effective_groups": float(chart["effective_groups"]),
    }


def test_concentration_stands_beside_both_nulls(tree, summary):
    here = tree["concentration"].to_dataset().sel(block="global", step=300)
    found = summary["concentration"]
    assert [row["k"] for row in found["by_k"]] == [1, 2, 4, 8, 16]
    assert found["at_k"] == found["by_k"][-1]
    at_k = here.sel(k=16)
    assert found["at_k"] == {
        "k": 16,
        "captured": float(at_k["captured"]),
        "captured_split": float(at_k["captured_split"]),
        "null_isotropic": ends(at_k, "null_isotropic"),
        "null_gradient": ends(at_k, "null_gradient"),
        "gain": ends(at_k, "gain"),
        "gain_centred": ends(at_k, "gain", "_centred"),
        "ln_gain": float(at_k["ln_gain"]),
        "concentrated": False,
        "null_optimizer": {"value": None, "low": None, "high": None},
        "gain_optimizer": {"value": None, "low": None, "high": None},
        "gain_optimizer_centred": {"value": None, "low": None, "high": None},
        "concentrated_optimizer": False,
    }
    assert found["rayleigh_ratio"] == ends(here, "rayleigh_ratio")
    assert (found["null_batch"], found["null_batch_limit"], found["share_outside_space"]) == (
        2,
        160,
        pytest.approx(0.04),
    )


def test_the_largest_k_with_a_gain_is_told_whatever_it_says(tree):
    tree = tree.copy(deep=True)
    for name in ("gain", "gain_low", "gain_high"):
        tree["concentration"][name][..., -1] = np.nan
    assert fisher_summary(tree)["concentration"]["at_k"]["k"] == 8
    for name in ("gain", "gain_low", "gain_high"):
        tree["concentration"][name][:] = np.nan
    found = fisher_summary(tree)["concentration"]
    assert (found["at_k"]["k"], found["at_k"]["gain"]["value"]) == (16, None)


def test_flags_are_counted_at_that_k():
    tree = with_fisher(example_tree(3, 2), update="leading")
    flags = tree["concentration"]["concentrated"]
    flags[:] = False
    flags.loc[{"block": "global", "step": [200, 300], "k": 16}] = True
    flags.loc[{"block": BLOCKS[0], "step": 300}] = True
    flags.loc[{"block": BLOCKS[1], "step": 300, "k": 8}] = True
    found = fisher_summary(tree)["concentration"]
    assert found["at_k"]["concentrated"] is True
    assert found["steps"] == {"concentrated": 2, "of": 3}
    assert found["blocks"] == {"concentrated": 1, "of": 2}
    # Joined over steps of different blocks, flags become numbers with gaps.
    tree["concentration"]["concentrated"] = flags.astype(float).where(flags["block"] != BLOCKS[0])
    assert fisher_summary(tree)["concentration"]["blocks"] == {"concentrated": 0, "of": 2}


def test_pairs_have_the_state_that_their_interval_proves(tree):
    tree = tree.copy(deep=True)
    tasks = tree["tasks"]
    for (first, second), (value, low, high) in {
        ("chart", "document"): (0.5, 0.2, 0.8),
        ("chart", "grounding"): (-0.5, -0.8, -0.2),
        ("document", "grounding"): (-0.4, -0.75, -0.05),  # alone it would be resolved, but not of three
        ("chart", "noise"): (np.nan, np.nan, np.nan),
        ("document", "noise"): (0.9, np.nan, np.nan),
    }.items():
        for end, number in (("", value), ("_low", low), ("_high", high)):
            tasks[f"cosine{end}"].loc[{"step": 300, "block": "global", "task": first, "task_": second}] = number
    states = {tuple(pair["tasks"]): pair["state"] for pair in fisher_summary(tree)["pairs"]}
    assert len(states) == 6
    assert states["chart", "document"] == "share"
    assert states["chart", "grounding"] == "conflict"
    assert states["document", "grounding"] == "undecided"
    assert states["chart", "noise"] == states["document", "noise"] == "unresolved"


def test_a_pair_has_overlap_transfer_both_ways_and_a_sentence():
    fisher = fisher_summary(with_fisher(example_tree(3, 2), space="factor"))
    pair = fisher["pairs"][0]
    assert pair["overlap"]["low"] < pair["overlap"]["value"] < pair["overlap"]["high"]
    assert pair["transfer"]["value"] > 0
    assert pair["transfer_back"]["value"] > 0
    assert pair["together"]["low"] < pair["cosine"]["low"] < pair["cosine"]["high"] < pair["together"]["high"]
    assert pair["sentence"].startswith("Tasks chart and document share directions: cosine ")


def test_the_parts_of_the_entropy_add_up(summary):
    parts = summary["mixture"]
    assert parts["within_tasks"] + parts["divergence"] == pytest.approx(parts["spectral_entropy"])
    assert parts["spectral_entropy"] == pytest.approx(summary["spectral_entropy"]["value"])
    assert parts["divergence"] < parts["largest_divergence"]
    assert parts["null_low"] < parts["null_high"] < parts["normalised_divergence"] < parts["normalised_largest"]


def test_steps_whose_null_stands_for_too_many_samples_could_not_be_concentrated(tree):
    tree = tree.copy(deep=True)
    tree["concentration"]["null_batch"][0] = 161
    assert fisher_summary(tree)["concentration"]["steps"]["of"] == 2


def test_a_result_of_an_older_version_lacks_what_that_did_not_measure(tree):
    later = ("_directional", "_normalised", "ln_gain", "effective_groups", "largest_", "null_batch_limit")
    groups = {name: tree[name].to_dataset() for name in ("fisher", "concentration", "tasks")}
    older = {
        f"/{name}": group.drop_vars([known for known in group.data_vars if any(part in known for part in later)])
        for name, group in groups.items()
    }
    found = strict(fisher_summary(type(tree).from_dict(older)))
    assert found["participation_ratio_directional"] == {"value": None, "low": None, "high": None}
    assert found["effective_groups"] is None
    assert found["concentration"]["steps"]["of"] == 3
    assert found["mixture"]["p_value"] is None  # a test of another χ


def test_what_is_not_known_is_none():
    assert fisher_summary(example_tree(1, 1)) is None
    assert fisher_summary(with_fisher(example_tree(3, 2), update="none"))["concentration"] is None
    alone = strict(fisher_summary(with_fisher(example_tree([7], 2), steps=(7,), means={"a": MEANS["chart"]}, groups=1)))
    assert (alone["pairs"], alone["mixture"]) == ([], None)
    assert alone["dominant_ratio"]["low"] is None
    assert alone["concentration"]["at_k"]["null_gradient"]["value"] is None
    unknown = strict(fisher_summary(with_fisher(example_tree([7], 2), steps=(7,), batch_size=0)))
    assert unknown["concentration"]["null_batch"] is None


def test_the_last_step_that_was_measured_counts(tree):
    tree = tree.copy(deep=True)
    for name in ("trace", "spectral_entropy"):
        tree["fisher"][name][2] = np.nan
    tree["concentration"]["captured"][1:] = np.nan
    found = fisher_summary(tree)
    assert (found["step"], found["concentration"]["step"]) == (200, 100)


def test_a_result_of_some_blocks_only_has_none(tree):
    groups = {name: tree[name].to_dataset() for name in ("fisher", "concentration", "tasks")}
    part = {f"/{name}": group.drop_sel(block="global") for name, group in groups.items()}
    assert fisher_summary(type(tree).from_dict(part)) is None
