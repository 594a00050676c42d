"""Tiny random models of many families, built from configuration alone, each with a LoRA configuration and a batch.

Widths are 16, vocabularies 64, two layers, images of 8 × 8 in patches of 4; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig
from torch import Tensor, nn

Batch = dict[str, Tensor]

VOCABULARY, IMAGE_TOKEN, SIZE, PATCH = 64, 60, 8, 4
WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **WORDS,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        build: Makes the model and a batch, both random.
        targets: What PEFT shall adapt, as ``target_modules``; ``"all-linear"`` reaches every tower and projector.
        parameters: PEFT's ``target_parameters``: fused experts.
    """

    build: Callable[[], tuple[nn.Module, Batch]]
    targets: str | tuple[str, ...] = "all-linear"
    parameters: tuple[str, ...] = ()

    def model(self, seed: int = 0) -> nn.Module:
        """The model alone; the same seed gives the same weights."""
        return self.model_and_batch(seed)[0]

    def model_and_batch(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        """The model, and a batch for which ``model(**batch).loss`` is a loss."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def lora(self, **changes: Any) -> LoraConfig:
        """A LoRA configuration of rank 2 in which B is not zero."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        names: dict[str, Any] = {"target_modules": targets, "target_parameters": list(self.parameters) or None}
        return LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False, **names, **changes})


def _words(image_tokens: int = 0, length: int = 6) -> Batch:
    """Two sentences to predict; each starts with its image's tokens."""
    ids = torch.randint(3, IMAGE_TOKEN - 4, (2, image_tokens + length))
    labels = ids.clone()
    ids[:, 1 : 1 + image_tokens] = IMAGE_TOKEN
    labels[:, 1 : 1 + image_tokens] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _uneven_words(image_tokens: Sequence[Sequence[int]], *, left: bool = False) -> Batch:
    """Sentences of different lengths to predict, each with images of so many tokens, padded to one length."""
    rows = []
    for number, images in enumerate(image_tokens):
        words = torch.randint(3, IMAGE_TOKEN - 4, (5 + len(images) + number % 3,))
        pieces = [torch.cat([words[n : n + 1], torch.full((count,), IMAGE_TOKEN)]) for n, count in enumerate(images)]
        ids = torch.cat([*pieces, words[len(images) :]])
        rows.append((ids, ids.where(ids != IMAGE_TOKEN, -100)))
    longest = max(len(ids) for ids, _ in rows)

    def padded(row: Tensor, filler: int) -> Tensor:
        missing = longest - len(row)
        return nn.functional.pad(row, (missing, 0) if left else (0, missing), value=filler)

    return {
        "input_ids": torch.stack([padded(ids, 0) for ids, _ in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(ids), 0) for ids, _ in rows]),
        "labels": torch.stack([padded(labels, -100) for _, labels in rows]),
    }


def _image(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, SIZE, SIZE)


def _llava() -> tuple[nn.Module, Batch]:
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=16)
    # The features come from the last layer: from the one before it, as by default, the last would have no gradient.
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )
    return hf.LlavaForConditionalGeneration(config), {**_words(4), "pixel_values": _image(2)}


def _qwen2_5_vl() -> tuple[nn.Module, Batch]:
    marks = {"video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "patch_size": PATCH,
        "window_size": 2 * PATCH,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = {**text, "rope_parameters": rope}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, **marks)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    batch = _words(4)
    # Qwen's processor hands patches over as rows: channels · two frames · patch².
    pixels = {"pixel_values": torch.randn(32, 3 * 2 * PATCH**2), "image_grid_thw": grid}
    kinds = {"mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}
    return hf.Qwen2_5_VLForConditionalGeneration(config), {**batch, **pixels, **kinds}


def _internvl() -> tuple[nn.Module, Batch]:
    vision = {**VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    text = hf.Qwen2Config(**{key: value for key, value in TEXT.items() if key != "head_dim"})
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=1)
    return hf.InternVLForConditionalGeneration(config), {**_words(1), "pixel_values": _image(2)}


def _paligemma() -> tuple[nn.Module, Batch]:
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=16)
    config = hf.PaliGemmaConfig(
        vision_config=vision,
        text_config=hf.GemmaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        projection_dim=16,
        hidden_size=16,
    )
    batch = _words(4)
    kinds = {"token_type_ids": (batch["input_ids"] != IMAGE_TOKEN).long()}
    return hf.PaliGemmaForConditionalGeneration(config), {**batch, **kinds, "pixel_values": _image(2)}


def _idefics3() -> tuple[nn.Module, Batch]:
    text = hf.LlamaConfig(**TEXT)
    config = hf.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=IMAGE_TOKEN, pad_token_id=0)
    return hf.Idefics3ForConditionalGeneration(config), {**_words(1), "pixel_values": _image(2, 1)}


def _smolvlm() -> tuple[nn.Module, Batch]:
    text = hf.LlamaConfig(**TEXT)
    config = hf.SmolVLMConfig(vision_config=VISION, text_config=text, image_token_id=IMAGE_TOKEN, pad_token_id=0)
    return hf.SmolVLMForConditionalGeneration(config), {**_words(1), "pixel_values": _image(2, 1)}


def _gemma3() -> tuple[nn.Module, Batch]:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
        boi_token_index=61,
        eoi_token_index=62,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    # Zero at first, so that nothing before it would have a gradient.
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    batch = _words(4)
    kinds = {"token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}
    return model, {**batch, **kinds, "pixel_values": _image(2)}


def _mllama() -> tuple[nn.Module, Batch]:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
    }
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.MllamaConfig(
        vision_config=vision,
        text_config={**text, "cross_attention_layers": [1], "rope_parameters": rope},
        image_token_index=IMAGE_TOKEN,
    )
    batch = _words(1)
    pixels = {
        "pixel_values": _image(2, 1, 1),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, batch["input_ids"].shape[1], 1, 1, dtype=torch.long),
    }
    model = hf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].endswith(("gate", "attn_gate", "mlp_gate")):
            nn.init.ones_(parameter)  # closed at first, so that nothing behind them would have a gradient
    return model, {**batch, **pixels}


def _gpt2() -> tuple[nn.Module, Batch]:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, **WORDS)
    return hf.GPT2LMHeadModel(config), _words()


def _llama() -> tuple[nn.Module, Batch]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), _words()


def _bert() -> tuple[nn.Module, Batch]:
    text = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
    model = hf.BertForSequenceClassification(hf.BertConfig(**text, num_labels=3))
    return model, {**_words(), "labels": torch.tensor([0, 2])}


def _t5() -> tuple[nn.Module, Batch]:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config), _words()


def _vit() -> tuple[nn.Module, Batch]:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))
    return model, {"pixel_values": _image(2), "labels": torch.tensor([0, 2])}


def _mixtral() -> tuple[nn.Module, Batch]:
    # Each token goes to all experts: the others would have no gradient.
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=3)), _words()


def _llava_uneven(images: Sequence[int]) -> tuple[nn.Module, Batch]:
    """So many images in each sample, of four tokens each."""
    return _llava()[0], {**_uneven_words([[4] * count for count in images]), "pixel_values": _image(sum(images))}


def _gemma3_uneven() -> tuple[nn.Module, Batch]:
    batch = _uneven_words([[4], [], [4]])
    kinds = {"token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}
    return _gemma3()[0], {**batch, **kinds, "pixel_values": _image(2)}


def _qwen2_5_vl_uneven(grids: Sequence[Sequence[tuple[int, int]]]) -> tuple[nn.Module, Batch]:
    """Images of different sizes, in patches, by sample; four patches are one token."""
    batch = _uneven_words([[h * w // 4 for h, w in sample] for sample in grids], left=True)
    patches = torch.tensor([[1, h, w] for sample in grids for h, w in sample])
    pixels = {"pixel_values": torch.randn(int(patches.prod(1).sum()), 3 * 2 * PATCH**2), "image_grid_thw": patches}
    return _qwen2_5_vl()[0], {**batch, **pixels, "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}


def _idefics3_uneven() -> tuple[nn.Module, Batch]:
    """One to three images a sample; those that a sample lacks are black and masked."""
    counts = (1, 3, 2)
    pixels, mask = torch.zeros(3, 3, 3, SIZE, SIZE), torch.zeros(3, 3, SIZE, SIZE, dtype=torch.bool)
    for sample, count in enumerate(counts):
        pixels[sample, :count], mask[sample, :count] = _image(count), True
    return _idefics3()[0], {
        **_uneven_words([[1] * count for count in counts]),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def _llava_next() -> tuple[nn.Module, Batch]:
    """Tiles: an image of 8 × 16 has two and an overview, one of 16 × 16 has four and an overview."""
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    model = hf.LlavaNextForConditionalGeneration(config)
    sizes, tiles = torch.tensor([[8, 16], [16, 16], [16, 8]]), (3, 5, 3)
    pixels = torch.zeros(3, max(tiles), 3, SIZE, SIZE)
    for sample, count in enumerate(tiles):
        pixels[sample, :count] = _image(count)
    # Tokens: four of the overview, and those of the tiles, with one at the end of each row.
    batch = _uneven_words([[4 + 2 * (4 + 1)], [4 + 4 * (4 + 1)], [4 + 4 * (2 + 1)]])
    return model, {**batch, "pixel_values": pixels, "image_sizes": sizes}


def _mistral3() -> tuple[nn.Module, Batch]:
    """Images of different sizes, four patches a token."""
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vision, image_size=2 * SIZE),
        text_config=hf.MistralConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    sizes = torch.tensor([[8, 16], [16, 16], [16, 8]])
    pixels = torch.zeros(3, 3, 2 * SIZE, 2 * SIZE)
    for sample, (height, width) in enumerate(sizes.tolist()):
        pixels[sample, :, :height, :width] = torch.randn(3, height, width)
    batch = _uneven_words([[h * w // 64] for h, w in sizes.tolist()])
    return hf.Mistral3ForConditionalGeneration(config), {**batch, "pixel_values": pixels, "image_sizes": sizes}


FAMILIES = {
    "llava": Family(_llava),
    "qwen2_5_vl": Family(_qwen2_5_vl),
    "internvl": Family(_internvl),
    "paligemma": Family(_paligemma),
    "idefics3": Family(_idefics3),
    "smolvlm": Family(_smolvlm),
    "gemma3": Family(_gemma3),
    "mllama": Family(_mllama),
    "gpt2": Family(_gpt2),
    "llama": Family(_llama),
    "bert": Family(_bert),
    "t5": Family(_t5),
    "vit": Family(_vit, targets=("query", "value", "q_proj", "v_proj", "projection")),
    "mixtral": Family(_mixtral, ("q_proj", "v_proj"), ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
}

#: Family → (matrices that LoRA trains, share of the trainable numbers that belong to them).
COVERED = {
    "llava": (28, 1.0),
    "qwen2_5_vl": (26, 1.0),
    "internvl": (28, 1.0),
    "paligemma": (27, 1.0),
    "idefics3": (27, 1.0),
    "smolvlm": (27, 1.0),
    "gemma3": (26, 1.0),
    "mllama": (33, 1.0),
    "gpt2": (8, 1.0),
    "llama": (14, 1.0),
    "bert": (14, 1.0),
    "t5": (32, 1.0),
    "vit": (5, 1.0),
    "mixtral": (16, 1.0),
}

#: Batches in which rows of the vision tower are not the samples in their order, or are of different numbers.
UNEVEN = {
    "an image in two of three samples": Family(lambda: _llava_uneven((1, 0, 1))),
    "two images, both of the first sample": Family(lambda: _llava_uneven((2, 0))),
    "two images, both of the second sample": Family(lambda: _llava_uneven((0, 2))),
    "as many images as samples": Family(lambda: _llava_uneven((0, 2, 1))),
    "gemma3 with a text": Family(_gemma3_uneven),
    "qwen2_5_vl of different sizes": Family(lambda: _qwen2_5_vl_uneven([[(4, 4)], [(2, 4), (4, 6)], [(2, 2)]])),
    "qwen2_5_vl with a text": Family(lambda: _qwen2_5_vl_uneven([[(4, 4)], [], [(2, 2), (4, 4)]])),
    "idefics3 of one to three images": Family(_idefics3_uneven),
    "llava_next in tiles": Family(_llava_next),
    "mistral3 of different sizes": Family(_mistral3),
}
