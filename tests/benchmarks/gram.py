"""What K costs: per-sample gradient Grams beside one plain forward-backward pass, and beside TorchJD's autogram.

    python -m tests.benchmarks.gram [--rounds 7] [--threads 1]

N = 32 sequences of 64 tokens, a Llama of 6 layers, 512 wide, with LoRA of rank 16 on all linear layers, float32, all
probes in one batch. Contestants in turns; each line is the ratio to the plain pass of the same round, median and range.
Machines are noisy: read the ratios. Weight space stands beside its model, ½ + N/(4T) of a plain pass on top of it.
Then the 16 largest eigenvalues of the Fisher: from K, and by ARPACK on curvlinops' empirical Fisher, if installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from probes.fisher import gradient_gram
from probes.losses import token_losses

SAMPLES, TOKENS, VOCABULARY = 32, 64, 1024


def model() -> nn.Module:
    """The model, with B that is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora).eval()


def batch() -> dict[str, Tensor]:
    """Random tokens."""
    rows = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": rows, "labels": rows}


def plain(model: nn.Module, given: dict[str, Tensor]) -> None:
    """One forward-backward pass of the same losses."""
    token_losses(model, given).sum().backward()
    model.zero_grad()


def autogram(model: nn.Module) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """TorchJD's Gramian of the same losses."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    return lambda _, given: engine.compute_gramian(token_losses(model, given))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, given = model(), batch()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contestants: dict[str, Callable[[], object]] = {"plain forward-backward": lambda: plain(net, given)}
    for space in ("tangent", "factor", "weight"):
        contestants[f"K in {space} space"] = lambda space=space: gradient_gram(net, given, space=space)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for name, contestant in contestants.items():  # once to warm up, and for the memory
        contestant()
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory[name], peak = (now - peak) / 1024, now
    if importlib.util.find_spec("torchjd") is not None:
        other = model()  # autogram leaves hooks on its model
        gramian = autogram(other)
        contestants["TorchJD autogram"] = lambda: gramian(other, given)
        times["TorchJD autogram"] = []
        theirs, ours = contestants["TorchJD autogram"](), gradient_gram(net, given, space="factor").gram["global"]
        apart = float((theirs.detach().double() - ours).abs().max() / ours.abs().max())  # pyright: ignore[reportAttributeAccessIssue]
        print(f"TorchJD's Gramian and K in factor space differ by {apart:.1e} of the largest entry.\n")
    for number in range(options.rounds):
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in order:
            times[name].append(seconds(contestants[name]))
    base = times["plain forward-backward"]
    print(f"{options.threads} threads, torch {torch.__version__}\n")
    print("| | median | range | peak memory on top |\n|---|---|---|---|")
    for name, each in times.items():
        ratios = [a / b for a, b in zip(each, base, strict=True)]
        more = f"{memory[name]:+.0f} MiB" if name in memory else ""
        print(f"| {name} | {statistics.median(ratios):.2f} × | {min(ratios):.2f} – {max(ratios):.2f} | {more} |")
    print(
        f"\nOne plain pass: {1e3 * statistics.median(base):.0f} ms. Model of weight space: "
        f"{1 + 0.5 + SAMPLES / (4 * TOKENS):.2f} ×."
    )
    eigenvalues(net, given)


def eigenvalues(net: nn.Module, given: dict[str, Tensor]) -> None:
    """Seconds for the 16 largest eigenvalues of the empirical Fisher of the factors."""
    took = seconds(lambda: torch.linalg.eigvalsh(gradient_gram(net, given, space="factor").gram["global"]))
    print(f"\n16 largest eigenvalues from K: {took:.2f} s, all of them and exact.")
    if importlib.util.find_spec("curvlinops") is None:
        print("curvlinops is not installed.")
        return
    from curvlinops import EFLinearOperator
    from scipy.sparse.linalg import eigsh

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, rows: Tensor) -> Tensor:
            return self.inner(input_ids=rows).logits[:, :-1]

    parameters = {name: p for name, p in Logits().named_parameters() if p.requires_grad}
    data = [(given["input_ids"], given["labels"][:, 1:])]
    operator = EFLinearOperator(
        Logits(), nn.CrossEntropyLoss(reduction="sum"), parameters, data, check_deterministic=False
    )
    took = seconds(lambda: eigsh(operator.to_scipy(), k=16, tol=1e-6, return_eigenvectors=False))
    print(f"by ARPACK on curvlinops' empirical Fisher (of tokens, its unit): {took:.2f} s.")


if __name__ == "__main__":
    main()
