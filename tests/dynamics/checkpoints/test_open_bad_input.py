"""Bad input: each gets a one-line finding that names file, matrix and remedy; the rest is read."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import NotARun, Trajectory, UnreadableMatrix, open_trajectory
from dynamics.findings import Finding
from tests.runs import adapter_config, adapter_tensors, random_factors, write_adapter, write_run, write_state

LOOKED_FOR = (
    "checkpoint-*/ or adapter_config.json with adapter_model.safetensors or adapter_model.bin, "
    "or model.safetensors[.index.json]"
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
WEIGHTS = "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"


def only(trajectory: Trajectory | NotARun, code: str) -> Finding:
    (finding,) = [finding for finding in trajectory.findings if finding.code == code]
    assert "\n" not in str(finding)
    return finding


def refused(run: Path) -> NotARun:
    with pytest.raises(NotARun) as raised:
        open_trajectory(run)
    assert "\n" not in str(raised.value)
    return raised.value


# --- no run at all -----------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "missing")
    assert str(error) == (
        f"No such folder: {str(tmp_path / 'missing')!r}. Pass a Trainer output folder, or one checkpoint."
    )


def test_empty_folder(tmp_path: Path) -> None:
    assert "is empty (looked for checkpoint-*/ or adapter_config.json" in str(refused(tmp_path))


def test_run_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file, not a run folder" in str(refused(tmp_path / "file"))


def test_run_is_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert "is a link to" in str(refused(tmp_path / "run"))


def test_folder_without_checkpoints_names_the_runs_inside(tmp_path: Path) -> None:
    write_run(tmp_path / "legal")
    write_adapter(tmp_path / "medical")
    (tmp_path / "README.md").write_text("x")
    message = str(refused(tmp_path))
    assert "No checkpoints in" in message
    assert message.endswith("Pass one of the runs inside it: legal, medical.")


@pytest.mark.parametrize(
    ("adapters", "ending"),
    [
        (("style",), "An adapter is in its subfolder style. Pass that subfolder."),
        (("legal", "style"), "Adapters are in its subfolders legal, style. Pass one of them."),
    ],
)
def test_folder_with_named_adapters_only(adapters: tuple[str, ...], ending: str, tmp_path: Path) -> None:
    for adapter in adapters:
        write_adapter(tmp_path / adapter)
    assert str(refused(tmp_path)).endswith(f"(looked for {LOOKED_FOR}). {ending}")
    assert open_trajectory(tmp_path / adapters[0]).steps == (0,)


def test_everything_refused_carries_the_findings(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20), adapter_config(use_dora=True))
    error = refused(tmp_path)
    assert [finding.code for finding in error.findings] == ["OD105", "OD105"]
    assert "can be analysed: 2 problems; the first: OD105" in str(error)


# --- weight files ------------------------------------------------------------------------------


def _zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _truncated_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def _text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def _edited(path: Path, change: Any) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _lying_shape(path: Path) -> None:
    _edited(path, lambda header: header[f"{KEY}.lora_A.weight"].update(shape=[4, 11]))


def _lying_offsets(path: Path) -> None:
    _edited(path, lambda header: header[f"{KEY}.lora_A.weight"].update(data_offsets=[0, 10**15]))


def _overlapping(path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        keys = [key for key in header if "lora_A" in key]
        header[keys[0]]["data_offsets"] = header[keys[1]]["data_offsets"]

    _edited(path, change)


def _negative(path: Path) -> None:
    _edited(path, lambda header: header[f"{KEY}.lora_A.weight"].update(shape=[-4, -10]))


def _unknown_dtype(path: Path) -> None:
    _edited(path, lambda header: header[f"{KEY}.lora_A.weight"].update(dtype="F128"))


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _list_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"[]")


DAMAGES = {
    _zero_bytes: "It is empty (zero bytes).",
    _truncated: "It is truncated or its header is wrong",
    _truncated_header: "It is truncated: its header alone needs",
    _longer: "Its header is wrong: the tensors take",
    _text: "Expected a safetensors file; its first bytes are not those of one.",
    _lying_shape: "F32 of shape [4, 11], cannot take 160 bytes",
    _lying_offsets: "ends at byte 1000000000000000",
    _overlapping: "tensors overlap or leave gaps",
    _negative: "Its header does not describe",
    _unknown_dtype: "the unknown dtype 'F128'",
    _huge_header: "Expected a safetensors file; its first bytes are not those of one.",
    _list_header: "Its header is not a JSON object.",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_damaged_weights_cost_one_checkpoint(damage: Any, message: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    damage(tmp_path / "checkpoint-20" / WEIGHTS)

    trajectory = open_trajectory(tmp_path)

    assert trajectory.steps == (10, 30)
    finding = only(trajectory, "OD101")
    assert finding.file == "checkpoint-20/adapter_model.safetensors"
    assert finding.step == 20
    assert message in finding.message
    assert finding.remedy


def test_weights_are_a_pointer(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / WEIGHTS).write_text(POINTER)

    finding = only(open_trajectory(tmp_path), "OD107")

    assert finding.file == "checkpoint-20/adapter_model.safetensors"
    assert "Git-LFS pointer" in finding.message
    assert "git lfs pull" in finding.remedy


def test_unreadable_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    blocked = tmp_path / "checkpoint-20" / WEIGHTS
    real = Path.open

    def forbidding(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == blocked:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidding)  # tests may run as root, whom permissions do not stop

    finding = only(open_trajectory(tmp_path), "OD101")
    assert finding.message == "Permission denied."
    assert "chmod" in finding.remedy


def test_weights_are_a_pipe(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "checkpoint-20" / WEIGHTS
    path.unlink()
    os.mkfifo(path)

    assert "not a regular file" in only(open_trajectory(tmp_path), "OD101").message


class Trap:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_not_executed(zipped: bool, tmp_path: Path) -> None:
    run, witness = tmp_path / "run", tmp_path / "witness"
    write_run(run)
    checkpoint = run / "checkpoint-20"
    (checkpoint / WEIGHTS).unlink()
    payload = {"tensor": torch.zeros(2), "trap": Trap(witness)}
    if zipped:
        torch.save(payload, checkpoint / "adapter_model.bin")
    else:
        (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps(payload))

    trajectory = open_trajectory(run)

    assert not witness.exists()
    assert trajectory.steps == (10, 30)
    finding = only(trajectory, "OD101")
    assert finding.file == "checkpoint-20/adapter_model.bin"
    # The trap works: whoever unpickles it gets caught.
    pickle.loads(pickle.dumps(Trap(witness)))
    assert witness.exists()


@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04broken", [1, 2], {"a": 1}])
def test_binary_that_holds_no_tensors(content: Any, tmp_path: Path) -> None:
    write_run(tmp_path)
    checkpoint = tmp_path / "checkpoint-20"
    (checkpoint / WEIGHTS).unlink()
    path = checkpoint / "adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    assert only(open_trajectory(tmp_path), "OD101").file == "checkpoint-20/adapter_model.bin"


def test_weights_outside_the_run_are_said_to_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    outside = tmp_path / "elsewhere.safetensors"
    (run / "checkpoint-20" / WEIGHTS).rename(outside)
    (run / "checkpoint-20" / WEIGHTS).symlink_to(outside)

    trajectory = open_trajectory(run)

    assert trajectory.steps == (10, 20, 30)
    assert "elsewhere.safetensors" in only(trajectory, "OD122").message


def test_file_that_changes_after_opening(tmp_path: Path) -> None:
    write_run(tmp_path)
    trajectory = open_trajectory(tmp_path)
    (tmp_path / "checkpoint-20" / WEIGHTS).unlink()

    with (
        trajectory.checkpoints[1].open() as matrices,
        pytest.raises(UnreadableMatrix, match="It was removed after its header was read"),
    ):
        matrices[Q]

    write_adapter(tmp_path / "checkpoint-20", random_factors(rank=2))
    with trajectory.checkpoints[1].open() as matrices, pytest.raises(UnreadableMatrix, match="has changed since"):
        matrices[Q]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("change", [-100, 100])
def test_file_whose_size_changes_while_it_is_open(binary: bool, change: int, tmp_path: Path) -> None:
    """Behind the end of a mapped file that became shorter is SIGBUS: no exception, the end of the process."""
    path = write_adapter(tmp_path, binary=binary) / ("adapter_model.bin" if binary else WEIGHTS)
    size = path.stat().st_size
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        assert matrices[Q].rank == 4
        os.truncate(path, size + change)
        with pytest.raises(UnreadableMatrix) as raised:
            matrices[Q]
    assert str(raised.value) == (
        f"Its size changed from {size} to {size + change} bytes after it was opened. "
        "Analyse the run again when it is saved."
    )


def test_file_that_is_replaced_while_it_is_open_is_read_as_it_was(tmp_path: Path) -> None:
    factors = random_factors()
    write_adapter(tmp_path / "run", factors)
    write_adapter(tmp_path / "new", random_factors(rank=2))
    with open_trajectory(tmp_path / "run").checkpoints[0].open() as matrices:
        (tmp_path / "new" / WEIGHTS).rename(tmp_path / "run" / WEIGHTS)
        assert torch.equal(matrices[Q].left_factor, factors[Q][0])


# --- configurations ----------------------------------------------------------------------------


CONFIGS: dict[str, tuple[str, str, str]] = {
    "empty": ("", "OD102", "It is empty"),
    "text": ("not json", "OD102", "It is not valid JSON"),
    "list": ("[1]", "OD102", "Expected a JSON object, got list"),
    "deep": ("[" * 100_000, "OD102", "It is not valid JSON"),
    "latin": ('{"a": "\xe9"}', "OD102", "It is not valid JSON"),
    "pointer": (POINTER, "OD107", "Git-LFS pointer"),
    "no peft_type": ('{"r": 4, "lora_alpha": 8}', "OD102", "Its peft_type is None"),
    "unknown peft_type": ('{"peft_type": "NEWLORA", "r": 4}', "OD103", "It is a NEWLORA adapter"),
    "IA3": ('{"peft_type": "IA3"}', "OD103", "It is an IA3 adapter"),
    "r is text": ('{"peft_type": "LORA", "r": "4", "lora_alpha": 8}', "OD102", "Its r is '4'"),
    "r is zero": ('{"peft_type": "LORA", "r": 0, "lora_alpha": 8}', "OD102", "Its r is 0"),
    "alpha is NaN": ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "OD102", "Its lora_alpha is nan"),
    "alpha is huge": ('{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + "0" * 400 + "}", "OD102", "Its lora_alpha is"),
    "alpha is zero": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 0}',
        "OD102",
        "Its lora_alpha is 0, so that its scale is 0 and PEFT adds nothing to the model, whatever the factors hold.",
    ),
    "alpha is zero for a module": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {".*_proj": 0}}',
        "OD102",
        "Its alpha_pattern is 0",
    ),
    "rslora is a number": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": 18446744073709551616}',
        "OD102",
        "Its use_rslora is 18446744073709551616; expected true or false.",
    ),
    "fan_in_fan_out is text": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": "false"}',
        "OD102",
        "Its fan_in_fan_out is 'false'; expected true or false.",
    ),
    "millions of lists": ("[" + "[]," * 1_000_000 + "[]]", "OD102", "It has about 1,000,002 objects and lists"),
    "bad pattern": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj(": 3}}',
        "OD102",
        "has the key 'q_proj(', which is not a regular expression",
    ),
    "pattern is a list": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": [3]}',
        "OD102",
        "Its rank_pattern is [3]",
    ),
    "switched on": (
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_newthing": true}',
        "OD103",
        "switches on use_newthing",
    ),
}


@pytest.mark.parametrize(("text", "code", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_bad_configuration_costs_one_checkpoint(text: str, code: str, message: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / "adapter_config.json").write_text(text, encoding="latin-1")

    trajectory = open_trajectory(tmp_path)

    assert trajectory.steps == (10, 30)
    finding = only(trajectory, code)
    assert finding.file.startswith("checkpoint-20/adapter_")
    assert finding.step == 20
    assert message in finding.message
    assert finding.remedy


def test_missing_configuration(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / "adapter_config.json").unlink()

    finding = only(open_trajectory(tmp_path), "OD102")

    assert finding.file == "checkpoint-20/adapter_model.safetensors"
    assert "no adapter_config.json" in finding.message


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"use_dora": True}, "OD105", "DoRA"),
        ({"kasa_config": {"beta": 1}}, "OD105", "KaSA"),
        ({"use_qalora": True}, "OD103", "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "OD103", "BD-LoRA"),
        ({"arrow_config": {"top_k": 1}}, "OD103", "Arrow"),
        ({"enable_lora": [True, False]}, "OD103", "enable_lora"),
        ({"init_lora_weights": "pissa_niter_4"}, "OD105", "PiSSA"),
        ({"init_lora_weights": "olora"}, "OD105", "OLoRA"),
        ({"init_lora_weights": "OLoRA"}, "OD105", "OLoRA"),
        ({"init_lora_weights": "corda"}, "OD105", "CorDA"),
        ({"init_lora_weights": "loftq"}, "OD105", "LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "OD105", "LoRA-GA"),
        ({"init_lora_weights": "novel"}, "OD105", "'novel' is unknown"),
    ],
)
def test_variants_that_are_no_plain_product(change: dict[str, Any], code: str, message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(**change))

    finding = only(refused(tmp_path), code)

    assert message in finding.message
    assert "4 matrices: model.layers.0.self_attn.q_proj" in finding.message
    assert len(finding.evidence["matrices"]) == 4


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"init_lora_weights": False}, "OD121", "includes that random start"),
        ({"alora_invocation_tokens": [1, 2]}, "OD121", "only on the tokens from the invocation"),
        ({"monteclora_config": {"num_samples": 8}}, "OD121", "without the sampled perturbations"),
        ({"shiny": 3}, "OD119", "that PEFT does not know; they are ignored: shiny"),
    ],
)
def test_variants_that_are_analysed_with_a_note(
    change: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, config=adapter_config(**change))

    trajectory = open_trajectory(tmp_path)

    assert len(trajectory.matrices) == 4
    assert message in only(trajectory, code).message


@pytest.mark.parametrize("init", [True, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_from_zero_need_no_note(init: Any, tmp_path: Path, codes: Any) -> None:
    write_adapter(tmp_path, config=adapter_config(init_lora_weights=init, velora_config={"num_groups": 64}))
    assert codes(open_trajectory(tmp_path).findings) == []


def test_old_configuration(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": None, "alpha_pattern": None}
    write_adapter(tmp_path, config=config)
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        assert matrices[Q].scale == 2.0


def test_configuration_without_alpha_takes_pefts_default(tmp_path: Path) -> None:
    write_adapter(tmp_path, config={"peft_type": "LORA", "r": 4})
    trajectory = open_trajectory(tmp_path)
    with trajectory.checkpoints[0].open() as matrices:
        assert matrices[Q].scale == 2.0
    assert "lacks lora_alpha: PEFT assumes r=4, lora_alpha=8" in only(trajectory, "OD119").message


# --- matrices ----------------------------------------------------------------------------------


def test_rank_unlike_the_configuration(tmp_path: Path) -> None:
    write_adapter(tmp_path, config=adapter_config(rank=8, rank_pattern={"q_proj": 4}))

    trajectory = open_trajectory(tmp_path)

    assert trajectory.matrices == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    finding = only(trajectory, "OD104")
    assert "gives it rank 8, its factors have rank 4" in finding.message
    assert finding.evidence["matrices"] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("part", "replacement", "code", "message"),
    [
        ("lora_B", None, "OD104", "It has lora_A, but no lora_B"),
        ("lora_A", None, "OD104", "It has lora_B, but no lora_A"),
        ("lora_B", torch.zeros(12, 5), "OD104", "lora_A [4, 10] and lora_B [12, 5] do not multiply"),
        ("lora_B", torch.zeros(12), "OD104", "lora_B has shape [12]"),
        ("lora_A", torch.zeros(0, 10), "OD104", "lora_A has shape [0, 10]"),
        ("lora_A", torch.zeros(4, 10, dtype=torch.uint8), "OD103", "lora_A is stored as U8"),
        ("lora_A", torch.zeros(4, 10).to(torch.float8_e4m3fn), "OD103", "lora_A is stored as F8_E4M3"),
    ],
)
def test_factors_that_do_not_fit_cost_one_matrix(
    part: str, replacement: torch.Tensor | None, code: str, message: str, tmp_path: Path
) -> None:
    tensors = adapter_tensors(random_factors())
    key = f"{KEY}.{part}.weight"
    if replacement is None:
        del tensors[key]
    else:
        tensors[key] = replacement
    write_adapter(tmp_path, tensors=tensors)

    trajectory = open_trajectory(tmp_path)

    assert len(trajectory.matrices) == 3
    finding = only(trajectory, code)
    assert finding.matrix == Q
    assert finding.file == WEIGHTS
    assert message in finding.message
    assert finding.remedy


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        ("lora_magnitude_vector", "OD105", "DoRA magnitude"),
        ("lora_diag", "OD103", "Beside its factors it has lora_diag"),
        ("lora_E", "OD103", "Beside its factors it has lora_E"),
    ],
)
def test_parts_that_make_it_no_plain_product(extra: str, code: str, message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, extra={f"{KEY}.{extra}": torch.ones(4)})
    trajectory = open_trajectory(tmp_path)
    assert len(trajectory.matrices) == 3
    finding = only(trajectory, code)
    assert finding.matrix == Q
    assert message in finding.message


def test_prompt_tuning_under_the_same_file_name(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_adapter(tmp_path / "checkpoint-20", tensors={"prompt_embeddings": torch.zeros(8, 16)})
    assert (
        "a prompt-tuning adapter, although its configuration says LORA"
        in only(open_trajectory(tmp_path), "OD103").message
    )


def test_adapter_without_any_factor(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors={"base_model.model.score.weight": torch.zeros(2, 3)})
    assert "target_modules may have matched nothing" in only(refused(tmp_path), "OD106").message


def test_several_adapters_inside_one_file(tmp_path: Path) -> None:
    tensors = {
        f"{KEY}.lora_{part}.{name}.weight": torch.ones(*shape)
        for part, shape in (("A", (4, 10)), ("B", (12, 4)))
        for name in ("first", "second")
    }
    write_adapter(tmp_path, tensors=tensors)
    assert "several adapters in one file ('first', 'second')" in only(refused(tmp_path), "OD103").message


def test_other_tensors_are_one_note_for_all_checkpoints(tmp_path: Path) -> None:
    extra = {
        "base_model.model.score.modules_to_save.weight": torch.zeros(2, 3),
        "base_model.model.score.original_module.weight": torch.zeros(2, 3),
        f"{KEY}.base_layer.bias": torch.zeros(12),
        f"{KEY}.lora_B.bias": torch.zeros(12),
        "base_model.model.norm.weight": torch.zeros(12),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.zeros(2, 2),
    }
    for step in (10, 20):
        write_adapter(tmp_path / f"checkpoint-{step}", random_factors(seed=step), extra=extra)

    trajectory = open_trajectory(tmp_path)

    finding = only(trajectory, "OD109")
    assert finding.evidence["counts"] == {
        "bias": 1,
        "lora_bias": 1,
        "modules_to_save": 2,
        "saved weights": 1,
        "trainable tokens": 1,
    }
    assert finding.evidence["steps"] == [10, 20]
    assert finding.remedy == (
        "Give the base (--base) to analyse those of them that are weight matrices. "
        "To analyse trained tokens, merge the adapter (merge_and_unload) and analyse the merged model with its base."
    )
    assert len(trajectory.matrices) == 4


# --- folders -----------------------------------------------------------------------------------


def test_state_and_configuration_without_weights(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / WEIGHTS).unlink()
    finding = only(open_trajectory(tmp_path), "OD106")
    assert finding.file == "checkpoint-20"
    assert "but no weights" in finding.message


def test_dangling_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-40").symlink_to(tmp_path / "gone")
    finding = only(open_trajectory(tmp_path), "OD106")
    assert finding.file == "checkpoint-40"
    assert "is a link to" in finding.message


def test_linked_checkpoint_is_read(tmp_path: Path, codes: Any) -> None:
    run = write_run(tmp_path / "run", (10, 20))
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoint-20").rename(elsewhere)
    (run / "checkpoint-20").symlink_to(elsewhere)
    trajectory = open_trajectory(run)
    assert trajectory.steps == (10, 20)
    assert codes(trajectory.findings) == []


def test_checkpoint_still_being_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "tmp-checkpoint-40").mkdir()
    assert only(open_trajectory(tmp_path), "OD118").file == "tmp-checkpoint-40"


def test_last_checkpoint_without_configuration_yet(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-30" / "adapter_config.json").unlink()
    (tmp_path / "checkpoint-30" / "trainer_state.json").unlink()
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert only(trajectory, "OD118").step == 30


def test_empty_last_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-40").mkdir()
    assert only(open_trajectory(tmp_path), "OD118").step == 40


def test_two_folders_for_one_step(tmp_path: Path) -> None:
    write_run(tmp_path, (10, 20))
    write_adapter(tmp_path / "checkpoint-0010", random_factors(seed=9))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20)
    assert trajectory.checkpoints[0].folder.name == "checkpoint-10"
    assert only(trajectory, "OD111").file == "checkpoint-0010"


def test_broken_whole_model_among_adapters_costs_one_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-40" / "model.safetensors").write_bytes(b"")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20, 30)
    assert only(trajectory, "OD101").file == "checkpoint-40/model.safetensors"


def test_step_beyond_64_bits(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_adapter(tmp_path / f"checkpoint-{10**20}")
    assert "64 bits" in only(open_trajectory(tmp_path), "OD106").message


# --- training state ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"), [("{", "OD108"), ("", "OD108"), ("[]", "OD108"), (POINTER, "OD107"), ('{"log_history"', "OD108")]
)
def test_unreadable_state_costs_only_the_log(text: str, code: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(text)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (10, 20, 30)
    assert only(trajectory, code).file == "checkpoint-20/trainer_state.json"


def test_state_of_another_step(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_state(tmp_path / "checkpoint-20", 21)
    assert "global_step is 21, its folder says 20" in only(open_trajectory(tmp_path), "OD119").message


def test_regular_expression_that_is_none(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(ValueError, match=r"^matrices='\(' is not a regular expression"):
        open_trajectory(tmp_path, matrices="(")


def test_regular_expression_that_matches_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(NotARun, match="matrices='k_proj' matches none of 4 matrices"):
        open_trajectory(tmp_path, matrices="k_proj")
