import json

import numpy as np
import pytest

from dynamics.findings import Finding
from dynamics.report import all_findings, summarise
from tests.trees import example_runs, example_tree, matrix_names

KEYS = {
    "answers",
    "captured",
    "gradient",
    "fisher", "intervention", "losses", "sharpness", "path", "base", "scores", "checkpoints", "checkpoint_choice",
    "routing", "association", "comparison", "score_comparison",
    "toolkit_version", "run", "label", "created", "steps", "segments", "matrices", "last_step", "suggested_rank_energy",
    "totals", "adapters", "over_matrices", "roles", "table", "findings",
}  # fmt: skip


def strict(summary):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(json.dumps(summary, allow_nan=False), parse_constant=refuse)


@pytest.fixture(scope="module")
def tree():
    return example_tree(matrices=7, findings=[Finding("OD202", "It is zero.")])


def test_has_the_stated_keys(tree):
    assert set(summarise(tree)) == KEYS


def test_survives_json_unchanged(tree):
    assert strict(summarise(tree)) == summarise(tree)


def test_numbers_are_the_results_own_at_the_last_step(tree):
    summary = summarise(tree)
    last = tree["update"].to_dataset().sel(kind="total", step=600)
    assert summary["last_step"] == 600
    assert summary["totals"]["frobenius_norm_all"] == float(last["frobenius_norm_all"])
    assert summary["totals"]["effective_rank_block_diagonal"] == float(last["effective_rank_block_diagonal"])
    for row in summary["table"]:
        own = last.sel(matrix=row["name"])
        assert row["stable_rank"] == float(own["stable_rank"])
        assert row["suggested_rank"] == int(own["suggested_rank"])
        assert (row["out"], row["in"], row["adapter_rank"]) == (256, 128, 8)


def test_largest_update_comes_first(tree):
    norms = [row["frobenius_norm"] for row in summarise(tree)["table"]]
    assert norms == sorted(norms, reverse=True)
    assert len(norms) == 7


def test_quartiles_stand_beside_chance(tree):
    rank = summarise(tree)["over_matrices"]["effective_rank_energy"]
    assert rank["lower_quartile"] < rank["median"] < rank["upper_quartile"] < rank["null_5_percent"]
    assert rank["null_5_percent"] < rank["null_mean"] < rank["null_95_percent"]
    assert set(summarise(tree)["over_matrices"]["frobenius_norm"]) == {"lower_quartile", "median", "upper_quartile"}


def test_shares_of_energy_add_up(tree):
    roles = summarise(tree)["roles"]
    assert sum(role["energy_share"] for role in roles) == pytest.approx(1.0)
    assert sum(role["matrices"] for role in roles) == 7


def test_segments_name_their_steps():
    tree = example_tree(steps=[10, 20, 30], segment=[1, 0, 1])
    assert summarise(tree)["segments"] == [{"segment": 0, "steps": [20]}, {"segment": 1, "steps": [10, 30]}]


def test_missing_is_none_with_a_flag():
    absent, zero, moved = matrix_names(3)
    table = {
        row["name"]: row for row in strict(summarise(example_tree(matrices=3, missing=[absent], zero=[zero])))["table"]
    }
    assert table[absent]["frobenius_norm"] is None
    assert table[absent]["flags"] == ["not_in_last_checkpoint"]
    assert table[zero]["frobenius_norm"] == 0
    assert table[zero]["effective_rank_energy"] is None
    assert table[zero]["flags"] == ["is_zero"]
    assert table[moved]["flags"] == []


def test_infinite_is_none_too():
    tree = example_tree(matrices=1, steps=1)
    tree["update"]["dominant_ratio"][:] = np.inf
    assert strict(summarise(tree))["table"][0]["dominant_ratio"] is None


def test_all_zero_is_valid_json():
    summary = strict(summarise(example_tree(zero=matrix_names(14))))
    assert summary["totals"]["frobenius_norm_all"] == 0
    assert summary["totals"]["entropy_energy_block_diagonal"] is None


def test_several_runs_stand_side_by_side():
    summary = strict(summarise(example_runs(a=example_tree(steps=1), b=example_tree(findings=[Finding("OD202", "z")]))))
    assert set(summary) == {"answers", "runs", "association", "comparison", "score_comparison", "findings"}
    assert set(summary["runs"]["a"]) == KEYS
    assert [finding["code"] for finding in all_findings(summary)] == ["OD100", "OD202"]


def test_findings_of_one_run(tree):
    assert [finding["message"] for finding in all_findings(summarise(tree))] == ["It is zero."]


def test_what_was_captured_and_the_last_gradient():
    tree = example_tree(matrices=4, gradients=[100, 200])
    tree.attrs["captured"] = json.dumps({"steps": [100, 200], "checkpoints": [200], "run_id": "x"})
    summary = summarise(tree)
    assert strict(summary)["captured"] == {"steps": 2, "checkpoints": 1}
    last = tree["summary_gradient"].to_dataset().sel(step=200)
    assert summary["gradient"] == {
        "step": 200,
        **{
            name: {"median": float(last[f"{name}_quantile"].sel(quantile=0.5))}
            for name in ("norm_before_clip", "norm_after_clip")
        },
        **{
            name: {
                "median": float(last[f"{name}_quantile"].sel(quantile=0.5)),
                "null_mean": float(last[f"{name}_null"]),
            }
            for name in ("effective_rank_energy", "dominant_ratio")
        },
    }


def test_nothing_captured_is_null(tree):
    assert [summarise(tree)[name] for name in ("captured", "gradient", "fisher", "intervention")] == [None] * 4


def test_gradients_without_spectra_have_null_measures():
    gradient = strict(summarise(example_tree(matrices=2, gradients=[100], gradient_spectra=False)))["gradient"]
    assert gradient["norm_before_clip"]["median"] > 0
    assert gradient["effective_rank_energy"] == {"median": None, "null_mean": None}
