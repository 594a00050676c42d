"""Every variant of adapter as PEFT itself writes it: the right product, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamics.checkpoints import NotARun, open_trajectory

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.v_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(self.q_proj(x))


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **changes})


def save(config: Any, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Model(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted


PLAIN: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "MiCA": lambda: lora(init_lora_weights="mica"),
    "EVA": lambda: lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "random start": lambda: lora(init_lora_weights=False),
    "VeLoRA": lambda: lora(velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=4)),
    "MonteCLoRA": lambda: lora(monteclora_config=peft.tuners.lora.config.MontecloraConfig(num_samples=2)),
    "aLoRA": lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_plain_products(make: Callable[[], Any], tmp_path: Path) -> None:
    config = make()
    config.task_type = None
    layer = save(config, tmp_path).base_model.model.q_proj
    expected = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 3

    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        assert list(matrices) == ["q_proj", "v_proj"]
        torch.testing.assert_close(matrices["q_proj"].to_dense(), expected.detach(), rtol=1e-12, atol=1e-12)
    # And it is the change that PEFT makes, in its own precision.
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected.float().detach())


def target() -> dict[str, Any]:
    return {"target_modules": ["q_proj", "v_proj"]}


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "DoRA": (lambda: lora(use_dora=True), "OD105", "DoRA"),
    "KaSA": (lambda: lora(kasa_config=peft.tuners.lora.config.KasaConfig()), "OD105", "KaSA"),
    "BD-LoRA": (
        lambda: lora(
            use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
            )
        ),
        "OD103",
        "BD-LoRA",
    ),
    "LoHa": (lambda: peft.LoHaConfig(r=4, **target()), "OD103", "LOHA"),
    "LoKr": (lambda: peft.LoKrConfig(r=4, **target()), "OD103", "LOKR"),
    "IA3": (lambda: peft.IA3Config(feedforward_modules=[], **target()), "OD103", "IA3"),
    "VeRA": (lambda: peft.VeraConfig(r=4, **target()), "OD103", "VERA"),
    "OFT": (lambda: peft.OFTConfig(r=4, oft_block_size=0, **target()), "OD103", "OFT"),
    "BOFT": (lambda: peft.BOFTConfig(boft_block_size=4, **target()), "OD103", "BOFT"),
    "HRA": (lambda: peft.HRAConfig(r=4, **target()), "OD103", "HRA"),
}


@pytest.mark.parametrize(("make", "code", "name"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_plain_product_is_refused_by_name(
    make: Callable[[], Any], code: str, name: str, tmp_path: Path
) -> None:
    save(make(), tmp_path)

    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)

    (finding,) = raised.value.findings
    assert finding.code == code
    assert name in finding.message
    assert "\n" not in str(finding)


def test_pissa_converted_by_peft_is_a_plain_adapter(tmp_path: Path) -> None:
    """PEFT turns s (B A − B₀ A₀) into one adapter of twice the rank on the original base weight."""
    torch.manual_seed(0)
    base = Model()
    before = base.q_proj.weight.detach().clone()
    adapted = peft.get_peft_model(base, lora(init_lora_weights="pissa"))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    layer = adapted.base_model.model.q_proj
    trained = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    with open_trajectory(tmp_path / "converted").checkpoints[0].open() as matrices:
        change = matrices["q_proj"].to_dense().float()
        assert matrices["q_proj"].rank == 8
    torch.testing.assert_close(change, trained - before, rtol=1e-4, atol=1e-5)


def test_tied_embedding_and_head(tmp_path: Path) -> None:
    """A head that is tied to the embedding carries the embedding's factors, transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    adapted = peft.get_peft_model(model, lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path)

    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        assert set(matrices) == {"lm_head", "model.embed_tokens"}
        head, embedding = matrices["lm_head"].to_dense(), matrices["model.embed_tokens"].to_dense()
    torch.testing.assert_close(head, embedding.T)
