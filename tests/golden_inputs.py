"""The inputs of ``tests.goldens``: small runs of many kinds, made with fixed seeds.

This module imports no other maker of the tests, because those may change and the inputs must not.
"""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dynamics
from probes import Task

#: What is kept in the repository.
DATA = Path(__file__).parent / "golden_data"
VOCABULARY = 32
NAMES = tuple(f"model.layers.{layer}.self_attn.{role}" for layer in range(2) for role in ("q_proj", "v_proj"))
#: Run to group.
GROUPS = {f"{group}_s{seed}": group for group in ("imax", "dmax") for seed in (1, 2, 3)}


def factors(seed: int, rank: int = 4, names: Sequence[str] = NAMES, size: tuple[int, int] = (12, 10)) -> dict[str, Any]:
    """Return Gaussian factors ``B [out, rank]`` and ``A [rank, in]`` for each name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(size[0], rank, generator=generator), torch.randn(rank, size[1], generator=generator))
        for name in names
    }


def _adapter(folder: Path, matrices: Mapping[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (left, right) in matrices.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
    config = {"peft_type": "LORA", "r": next(iter(matrices.values()))[0].shape[1], "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True, **changes}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _state(folder: Path, step: int, every: int = 5, loss: float = 2.0, **logged: float) -> None:
    log = [
        {"epoch": at / 100, "learning_rate": 1e-4, "loss": loss * 0.99**at + 0.1 * math.sin(at + loss), "step": at}
        | logged
        for at in range(every, step + 1, every)
    ]
    state = {"global_step": step, "epoch": step / 100, "log_history": log, "max_steps": 100, "save_steps": 10}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def _drifting(steps: Sequence[int], seed: int, **shape: Any) -> dict[int, dict[str, Any]]:
    start = factors(seed, **shape)
    noise = {step: factors(seed + 1 + number, **shape) for number, step in enumerate(steps)}
    return {
        step: {
            name: (left * 0.1 * (1 + number) + noise[step][name][0] * 0.02, right + noise[step][name][1] * 0.02)
            for name, (left, right) in start.items()
        }
        for number, step in enumerate(steps)
    }


def make_pydoc_lora(folder: Path) -> None:
    """Copy the run that comes with the examples."""
    shutil.copytree(Path(dynamics.__file__).parents[1] / "examples" / "runs" / "pydoc_lora", folder / "run")


def make_multi_adapter(folder: Path) -> None:
    """Write two adapters a checkpoint, a matrix that stays zero, one that disappears, and a broken checkpoint."""
    for step, policy in _drifting((10, 20, 30, 40), seed=1).items():
        checkpoint = folder / "run" / f"checkpoint-{step}"
        policy[NAMES[0]] = (torch.zeros_like(policy[NAMES[0]][0]), policy[NAMES[0]][1])
        if step == 40:
            del policy[NAMES[3]]
        _adapter(checkpoint / "policy", policy, rank_pattern={}, alpha_pattern={"v_proj": 3})
        other = _drifting((10, 20, 30, 40), seed=9, rank=2)[step]
        _adapter(checkpoint / "style", other, use_rslora=True, lora_alpha=5)
        _state(checkpoint, step)
    broken = folder / "run" / "checkpoint-50" / "policy"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{")
    (broken / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def make_kohya(folder: Path) -> None:
    """Write numbered files of kohya and LyCORIS: kernels, LoHa, LoKr, and a DoRA that is refused."""
    (folder / "run").mkdir(parents=True)
    for step in (10, 20, 30):
        generator = np.random.default_rng(step)  # torch's normal numbers are not the same on all processors

        def random(*shape: int, generator: np.random.Generator = generator) -> Tensor:
            return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

        tensors = {
            "lora_unet_down_blocks_0_q.lora_down.weight": random(4, 10),
            "lora_unet_down_blocks_0_q.lora_up.weight": random(6, 4) * step / 10,
            "lora_unet_down_blocks_0_q.alpha": torch.tensor(3.0),
            "lora_te_text_model_v.lora_down.weight": random(4, 10).half(),
            "lora_te_text_model_v.lora_up.weight": random(6, 4).half(),
            "lora_unet_conv.lora_down.weight": random(4, 5, 3, 3),
            "lora_unet_conv.lora_up.weight": random(6, 4, 1, 1),
            "lora_unet_conv.alpha": torch.tensor(1.0),
            "lora_unet_loha.hada_w1_a": random(6, 2),
            "lora_unet_loha.hada_w1_b": random(2, 10),
            "lora_unet_loha.hada_w2_a": random(6, 2),
            "lora_unet_loha.hada_w2_b": random(2, 10),
            "lora_unet_loha.alpha": torch.tensor(3.0),
            "lora_unet_lokr.lokr_w1_a": random(4, 3),
            "lora_unet_lokr.lokr_w1_b": random(3, 3),
            "lora_unet_lokr.lokr_w2_a": random(4, 2),
            "lora_unet_lokr.lokr_w2_b": random(2, 5),
            "lora_unet_lokr.alpha": torch.tensor(3.0),
            "lora_unet_v.dora_scale": torch.ones(6, 1),
            "lora_unet_v.lora_down.weight": random(4, 10),
            "lora_unet_v.lora_up.weight": random(6, 4),
        }
        save_file(tensors, folder / "run" / f"style-{step:06d}.safetensors")


def _model_tensors(seed: int, step: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return a small language model with stacked experts, changed by a rank-2 update that grows with the step."""
    generator, drift = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + step)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (16, 16)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (24, 16)
        shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (3, 16, 20)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (16,)
    tensors = {}
    for key, shape in shapes.items():
        start = torch.randn(*shape, generator=generator)
        if len(shape) > 1:
            left, right = (*shape[:-1], 2), (*shape[:-2], 2, shape[-1])
            change = torch.randn(*left, generator=drift) @ torch.randn(*right, generator=drift)
        else:
            change = torch.randn(*shape, generator=drift)
        tensors[key] = (start + 0.0003 * step * change).to(dtype)
    return tensors


def make_dense_base(folder: Path) -> None:
    """Write whole models in bfloat16 shards, and the model before training."""
    _model(folder / "base", _model_tensors(3))
    for step in (10, 20, 30):
        _model(folder / "run" / f"checkpoint-{step}", _model_tensors(3, step))
        _state(folder / "run" / f"checkpoint-{step}", step)


def _model(folder: Path, tensors: Mapping[str, Tensor], shards: int = 2) -> None:
    folder.mkdir(parents=True)
    listed = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensor for number, (key, tensor) in enumerate(tensors.items()) if number % shards == shard}
        save_file(part, folder / name, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))


def make_distributed(folder: Path) -> None:
    """Write distributed checkpoints as the Trainer does under FSDP, and a base in one file."""
    import torch.distributed.checkpoint as distributed  # slow to import, and seldom needed

    _model(folder / "base", _model_tensors(5, dtype=torch.float32), shards=1)
    for step in (10, 20):
        checkpoint = folder / "run" / f"checkpoint-{step}"
        target = checkpoint / "pytorch_model_fsdp_0"
        target.mkdir(parents=True)
        state = {"model": _model_tensors(5, step, torch.float32)}
        distributed.save(state, checkpoint_id=target, no_dist=True)
        _state(checkpoint, step)


def make_six_runs(folder: Path) -> None:
    """Write six runs in two groups, with training losses, and a file of scores."""
    steps = (10, 20, 30, 40, 50)
    rng = np.random.default_rng(0)
    lines = ["run,step,task,score"]
    for number, name in enumerate(GROUPS):
        for step, matrices in _drifting(steps, seed=20 * number).items():
            _state(_adapter(folder / name / f"checkpoint-{step}", matrices), step, loss=2 + number / 10)
            lines.append(f"{name},{step},vqa/accuracy,{0.5 + step / 200 + 0.1 * rng.uniform():.4f}")
            lines.append(f"{name},{step},report/loss,{2 - step / 100 + 0.2 * rng.uniform():.4f}")
    lines.append("nobody,10,vqa/accuracy,0.5")
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")


# Trainings


def llama(width: int = 16, layers: int = 2) -> nn.Module:
    """Return a small Llama; equal arguments give equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, num_attention_heads=2, **sizes))


def _rows(count: int, seed: int) -> list[dict[str, Any]]:
    rows = torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def largest_logit(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the largest logit of each sample, as a score that is not the loss."""
    return model(**batch).logits.flatten(1).amax(1)


def tasks(count: int = 16) -> list[Task]:
    """Return two tasks of held-out sequences, two sequences an image."""
    samples = {
        name: [{**row, "image": f"{name}{number // 2}"} for number, row in enumerate(_rows(count, seed))]
        for name, seed in (("a", 11), ("b", 12))
    }
    score: dict[str, Any] = {"score": largest_logit, "higher_is_better": False}
    return [Task("a", samples["a"], group="image"), Task("b", samples["b"], group="image", **score)]


def load(folder: str) -> tuple[Any, ...]:
    """Return model, tasks, samples per optimizer step, and momentum for a checkpoint."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(Path(folder).parents[1] / "base")
    return PeftModel.from_pretrained(base, folder, is_trainable=True), tasks(), 4, 0.9


def _train(folder: Path, probed: list[Task] | None, **when: Any) -> None:
    """Train LoRA for eight steps of two accumulated batches, with a callback that records."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    base = llama()
    base.save_pretrained(folder / "base")  # type: ignore[operator]
    set_seed(5)
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)  # type: ignore[arg-type]
    chosen: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    chosen |= {"max_steps": 8, "learning_rate": 1e-2, "max_grad_norm": 0.2, "logging_steps": 3, "save_steps": 4}
    chosen |= {"save_only_model": True, "disable_tqdm": True, "report_to": "none", "seed": 3}
    callback = dynamics.DynamicsCallback(folder / "run", probed, preset="full", **when)
    set_seed(5)
    training = Trainer(
        model, TrainingArguments(str(folder / "run"), **chosen), train_dataset=_rows(64, 1), callbacks=[callback]
    )
    training.remove_callback(PrinterCallback)
    callback.attach(training)
    training.train()


def make_two_tasks(folder: Path) -> None:
    """Train with checkpoints, and with records of two tasks."""
    _train(folder, tasks(), at=[1, 2, 4, 6, 8])


def make_capture_checkpoints(folder: Path) -> None:
    """Train with checkpoints, and with records without tasks."""
    _train(folder, None, every=2)


def make_capture(folder: Path) -> None:
    """Record a loop that trains all weights and later freezes the embedding; no checkpoints."""
    _loop(folder / "run", llama(), tasks()[:1], (1, 2, 4, 6, 8), frozen="model.embed_tokens.weight")


def make_first_format(folder: Path) -> None:
    """Unpack records and an analysis of the first edition, which it wrote for ``_small_training``.

    Later code cannot write them. In ``.staging/written.json`` the host name was replaced.
    """
    unpack(DATA / "first_format.tar.xz", folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of this repository; Python before 3.11.4 has no filters."""
    with tarfile.open(archive) as members:
        members.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def _small_training(folder: Path) -> None:
    """Record two matrices and two tasks: small enough for the repository."""
    from peft import LoraConfig, get_peft_model

    base = llama(width=8, layers=1)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    _loop(folder / "run", model, tasks(8), (1, 2, 4), batch_size=4)


def _loop(
    run: Path, model: nn.Module, probed: list[Task], at: Sequence[int], frozen: str | None = None, **how: Any
) -> None:
    """Train until the last recorded step; freeze a parameter before step 5."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    batches = _rows(64, 1)
    with dynamics.Recorder(run, model, preset="full", at=at, tasks=probed, **how) as recorder:
        for step in range(1, at[-1] + 1):
            if step == 5 and frozen is not None:
                model.get_parameter(frozen).requires_grad_(False)
            with recorder.step(step, optimizer):
                rows = batches[4 * step : 4 * step + 4]
                batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                model(**batch).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()


def make_probed(folder: Path) -> None:
    """Train as ``make_two_tasks`` does, and remove the records."""
    make_two_tasks(folder)
    shutil.rmtree(folder / "run" / "dynamics")


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "pydoc_lora": make_pydoc_lora,
    "multi_adapter": make_multi_adapter,
    "kohya": make_kohya,
    "dense_base": make_dense_base,
    "distributed": make_distributed,
    "capture": make_capture,
    "capture_checkpoints": make_capture_checkpoints,
    "two_tasks": make_two_tasks,
    "six_runs": make_six_runs,
    "first_format": make_first_format,
    "probed": make_probed,
}
