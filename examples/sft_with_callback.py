"""Watch supervised fine-tuning by TRL: the `SFTTrainer` is a Trainer, so the callback is the same. Seconds on a CPU.

The model is a tiny random Llama, the tokenizer is trained on the spot, and the texts are sentences of Python's own
language reference, so nothing is downloaded. Needs TRL: `pip install trl`.

    python examples/sft_with_callback.py --out runs/sft
    python -m dynamics.analyze runs/sft
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from dynamics import DynamicsCallback


def sentences() -> list[str]:
    """Return paragraphs of prose from the language reference, each once."""
    paragraphs = (" ".join(block.split()) for text in topics.values() for block in text.split("\n\n"))
    return list(dict.fromkeys(p for p in paragraphs if 80 < len(p) < 400 and p.endswith(".")))


def byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of 512 tokens, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]  # tokens 0, 1, 2
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for checkpoints and records")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    args = parser.parse_args()

    set_seed(0)
    texts = sentences()
    tokenizer = byte_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    training = SFTConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_length=64,
        logging_steps=5,
        save_steps=args.steps,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
    )
    callback = DynamicsCallback(args.out, preset="standard")
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        args=training,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16),
        callbacks=[callback],
    )
    callback.attach(trainer)
    trainer.train()
    print(f"\nSee all of it:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
