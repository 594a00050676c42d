"""What K costs: per-sample gradient Grams beside one plain forward-backward pass, and beside TorchJD's autogram.

    python -m tests.benchmarks.gram [--rounds 7] [--threads 1]

N = 32 sequences of 64 tokens, a Llama of 6 layers, 512 wide, with LoRA of rank 16 on all linear layers, float32, all
probes in one batch; then what each further batch of a stream takes, whose rows are not checked any more, and 64
sequences in batches of 8. In tangent space also with the gradients passed through an optimizer. Contestants in turns;
each line is the ratio to the plain passes of the same batches in the same round, median and range. Times are those of
the processor, so that others on the machine disturb them less: with one thread, they are what a free machine would
take. Weight space stands beside a count of its operations, ½ for the gradients multiplied out and N/(2T) for their
inner products on top of a plain pass. Then the 16 largest eigenvalues of the Fisher: from K, and by Lanczos on the
empirical Fishers of hessian-eigenthings and of curvlinops, if they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynamics.fisher.concentration import predictive_draws
from probes.gram import SPACES, gradient_gram
from probes.losses import token_losses

SAMPLES, TOKENS, VOCABULARY, LEADING = 32, 64, 1024, 16

#: Batches of a stream, from which follows what one more takes; the other setting.
BATCHES, SMALL_BATCH = 3, 8


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


def small_batches() -> list[dict[str, Tensor]]:
    """Random tokens of twice as many sequences."""
    rows = torch.randint(VOCABULARY, (2 * SAMPLES, TOKENS), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": part, "labels": part} for part in rows.split(SMALL_BATCH)]


def plain(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """One forward-backward pass of the same losses for each batch."""
    for given in batches:
        token_losses(model, given).sum().backward()
        model.zero_grad()


def stepped(net: nn.Module, given: dict[str, Tensor], kind: Any) -> torch.optim.Optimizer:
    """An optimizer of the factors that has a state, and has moved nothing."""
    optimizer = kind([parameter for parameter in net.parameters() if parameter.requires_grad], lr=1e-12)
    token_losses(net, given).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def drawn(k: Tensor) -> Tensor:
    """Gradients for an optimizer that is not linear."""
    return torch.from_numpy(predictive_draws(k.numpy(), np.arange(len(k)), 64))


def autogram(model: nn.Module) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """TorchJD's Gramian of the same losses."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    return lambda _, given: engine.compute_gramian(token_losses(model, given))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and what came of it."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, given = model(), batch()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small, base, small_base = small_batches(), "plain forward-backward", f"plain, batches of {SMALL_BATCH}"
    contestants: dict[str, Callable[[], object]] = {base: lambda: plain(net, [given])}
    for space in SPACES:
        contestants[f"K in {space} space"] = lambda space=space: gradient_gram(net, given, space=space)
    for space in SPACES:
        contestants[f"K in {space} space, {BATCHES} batches"] = lambda space=space: gradient_gram(
            net, [given] * BATCHES, space=space
        )
    for optimizer in (torch.optim.AdamW, torch.optim.Muon):
        contestants[f"K in tangent space, through {optimizer.__name__}"] = partial(
            gradient_gram, net, given, optimizer=stepped(net, given, optimizer), draws=drawn
        )
    contestants[small_base] = lambda: plain(net, small)
    for space in SPACES:
        contestants[f"K in {space} space, batches of {SMALL_BATCH}"] = lambda space=space: gradient_gram(
            net, small, space=space
        )
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
            times[name].append(timed(contestants[name])[0])
    print(f"{options.threads} threads, torch {torch.__version__}\n")
    print("| | median | range | peak memory on top |\n|---|---|---|---|")
    for name, seconds in times.items():
        plain_times = times[small_base if name.endswith(f"of {SMALL_BATCH}") else base]
        if name.endswith(f"{BATCHES} batches"):
            first = times[name.removesuffix(f", {BATCHES} batches")]
            seconds = [(all_of_them - one) / (BATCHES - 1) for all_of_them, one in zip(seconds, first, strict=True)]
            name = name.replace(f"{BATCHES} batches", "each further batch")
        ratios = [one / other for one, other in zip(seconds, plain_times, strict=True)]
        more = f"{memory[name]:+.0f} MiB" if name in memory else ""
        print(f"| {name} | {statistics.median(ratios):.2f} × | {min(ratios):.2f} – {max(ratios):.2f} | {more} |")
    print(
        f"\nOne plain pass: {1e3 * statistics.median(times[base]):.0f} ms. By count of operations, weight space takes "
        f"{1 + 0.5 + SAMPLES / (2 * TOKENS):.2f} ×, without the check of rows."
    )
    eigenvalues(net, given)


def eigenvalues(net: nn.Module, given: dict[str, Tensor]) -> None:
    """Seconds for the 16 largest eigenvalues of the empirical Fisher of the factors."""
    took, exact = timed(lambda: torch.linalg.eigvalsh(gradient_gram(net, given, space="factor").gram["global"]))
    exact = exact.flip(0)[:LEADING] / SAMPLES
    print(f"\n{LEADING} largest eigenvalues from K: {took:.2f} s, exact.")
    for name, contestant in {"hessian_eigenthings": by_eigenthings, "curvlinops": by_curvlinops}.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed.")
            continue
        theirs, (unit, found) = timed(lambda contestant=contestant: contestant(net, given))
        apart = f", {float((found - exact).abs().max() / exact[0]):.0e} from ours" if unit == "sequence" else ""
        print(f"By Lanczos on the empirical Fisher of {unit}s of {name}: {theirs:.1f} s, {theirs / took:.0f} ×{apart}.")


def by_eigenthings(net: nn.Module, given: dict[str, Tensor]) -> tuple[str, Tensor]:
    """By hessian-eigenthings, whose samples are ours: sequences."""
    from hessian_eigenthings import EmpiricalFisherOperator, lanczos  # pyright: ignore[reportMissingImports]

    def loss(inner: nn.Module, rows: Tensor) -> Tensor:
        logits = inner(input_ids=rows[None]).logits[0, :-1]
        return nn.functional.cross_entropy(logits, rows[1:], reduction="sum")

    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    operator = EmpiricalFisherOperator(
        net, [given["input_ids"]], loss, param_filter=lambda name, parameter: name in trained
    )
    with torch.no_grad():  # its products would keep their graphs from step to step
        found = lanczos(operator, k=LEADING, tol=1e-6, seed=0)
    return "sequence", found.eigenvalues.double().cpu().sort(descending=True).values


def by_curvlinops(net: nn.Module, given: dict[str, Tensor]) -> tuple[str, Tensor]:
    """By curvlinops, which takes each token for a sample: another Fisher, at the cost of one of ours."""
    from curvlinops import EFLinearOperator  # pyright: ignore[reportMissingImports]
    from scipy.sparse.linalg import eigsh

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, rows: Tensor) -> Tensor:
            return self.inner(input_ids=rows).logits[:, :-1].mT  # classes second, as its loss has them

    function = Logits()
    parameters = [p for p in function.parameters() if p.requires_grad]
    data = [(given["input_ids"], given["labels"][:, 1:])]
    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = EFLinearOperator(function, loss, parameters, data, check_deterministic=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no forward derivative
        found = eigsh(operator.to_scipy(), k=LEADING, tol=1e-6, return_eigenvectors=False)  # pyright: ignore[reportArgumentType]
    return "token", torch.from_numpy(found).double()


if __name__ == "__main__":
    main()
