"""Steps per second of one training job, on one machine in one run, as pyreft, AdapterHub, PEFT and this package run it.

    pip install as requirements-peers.txt says, then
    python -m benchmarks.training_steps [--data train.jsonl.gz] [--positions l7 f7+l7] [--rounds 9] [--threads 1]

A step is forward with loss, backward, AdamW and zero_grad; LoReFT of rank 8 edits all layers, and LoRA has that rank.

    forward                the frozen model's forward with its loss, without gradient: no training
    floor                  its forward, and the backward of the gradients of hidden states to the first layer's output
    floor_targets          the same with logits only for the columns that predict a target
    pyreft                 the authors' pyreft on pyvene
    adapters               AdapterHub's LoReFT
    lora                   PEFT's LoRA in q_proj and v_proj
    reft_kernels           ReftModel
    reft_kernels_polar     with orthogonality="polar" and StiefelAdamW
    reft_kernels_targets   with logits only for the columns that predict a target, as the package's trainer does it
    reft_kernels_graphs    the same with --step-graphs, on CUDA devices
    reft_kernels_cached    as the trainer does it with --cache-frozen memory, once every row has been seen

**The loop is the same plain one for all.** pyreft's own ReftTrainerForCausalLM runs on transformers 4.45 alone, on
which AdapterHub does not run; what its compute_loss adds to the model's call, the positions as nested lists made from
the batch's tensor, is done and timed here, and what transformers' Trainer costs around a step is left out for all.
Batches are collated before, so that nobody's data loader is timed. All sides get the same tokens, mask, labels, dtype
and threads, share the base model's weights, and the ReFT sides start from the same R, W and b; the losses of the first
step are compared (AdapterHub's is another one, as its suffix ends at the row's end and not at the prompt's: as many
tokens, others). Sides take turns, a step each; steps per second are from medians, "over floor" is the median of the
ratios to the floor's step of the same round. Sides whose package is missing are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from benchmarks.ops import machine, store
from benchmarks.training_sides import BUILDERS, Batch, Job, Side, Unavailable, share_weights
from reft_kernels.positions import parse_positions
from reft_kernels.training.data import SupervisedCollator
from reft_kernels.training.item_layout import ItemLayout

RESULTS = machine.ROOT / "benchmarks" / "results" / "training_steps_cpu.json"
PACKAGES = ("torch", "transformers", "pyreft", "pyvene", "adapters", "peft")
# Deciles 1, 2.5, 5, 7.5 and 9 of the lengths of ARC-Easy's prompts, and its answers with their end token.
PROMPT_LENGTHS, ANSWER_LENGTH = (58, 63, 74, 92, 107), 7
# Losses of sides that compute the same may differ by so much of it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
COLOURS = {
    "forward": "#cbd5e0", "floor": "#a0aec0", "floor_targets": "#a0aec0", "pyreft": "#dd6b20", "adapters": "#d69e2e",
    "lora": "#805ad5",
}  # fmt: skip
OURS = "#2b6cb0"


def base_model(arguments: argparse.Namespace) -> Any:
    """The frozen model: SmolLM2-135M, also with random weights, a folder, or with --tiny a random Llama."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.random:
        from benchmarks.smollm2 import random_smollm2

        model = random_smollm2(arguments.seed).to(dtype)
    elif arguments.tiny:
        from benchmarks.tiny import tiny_llama

        model = tiny_llama(arguments.seed).to(dtype)
    else:
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    return model.eval().requires_grad_(False).to(arguments.device)


def read_pairs(arguments: argparse.Namespace, vocabulary: int, end: int) -> list[tuple[Tensor, int]]:
    """Token ids of prompt and answer, and the prompt's length, of as many rows as the batches hold."""
    count = arguments.batches * arguments.batch
    if arguments.data is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        picked = torch.randint(len(PROMPT_LENGTHS), (count,), generator=generator).tolist()
        lengths = [PROMPT_LENGTHS[k] for k in picked]
        return [(torch.randint(3, vocabulary, (n + ANSWER_LENGTH,), generator=generator), n) for n in lengths]
    from tokenizers import Tokenizer

    from reft_kernels.training import read_jsonl
    from reft_kernels.training.prompts import prompt_and_target

    # Not by AutoTokenizer: transformers 4.57 does not know the class that transformers 5 saves.
    tokenizer = Tokenizer.from_file(str(Path(arguments.model) / "tokenizer.json"))
    pairs = []
    for row in read_jsonl(arguments.data, max_examples=count):
        prompt, target = prompt_and_target(row.instruction, row.input, row.output)
        ids = [*tokenizer.encode(f"{prompt}{target}").ids, end]
        pairs.append((torch.tensor(ids), len(tokenizer.encode(prompt).ids)))
    if len(pairs) < count:
        raise SystemExit(f"--data {arguments.data}: {count} rows are needed, it has {len(pairs)}")
    return pairs


def make_batches(pairs: Sequence[tuple[Tensor, int]], positions: str, layers: int, size: int) -> list[Batch]:
    """Batches of SupervisedCollator, with the positions to edit in every layer."""
    needed = sum(parse_positions(positions) or ())
    if short := [start for _, start in pairs if start < needed]:
        raise SystemExit(f"--positions {positions}: a prompt has only {min(short)} tokens")
    layout = ItemLayout([positions] * layers)
    items = [layout.item(ids, start) for ids, start in pairs]
    return [SupervisedCollator(0)(items[k : k + size]) for k in range(0, len(items), size)]


def build(job: Job, without: Sequence[str]) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides, and why the others are missing."""
    sides: dict[str, Side] = {}
    missing = {}
    for name, builder in BUILDERS.items():
        if name in without:
            missing[name] = "left out by --without"
            continue
        try:
            sides[name] = builder(job)
        except (ImportError, Unavailable) as error:
            missing[name] = str(error)
            print(f"without {name}: {error}", file=sys.stderr)
    share_weights(sides)
    return sides, missing


def compare_losses(sides: dict[str, Side], dtype: str) -> dict[str, float]:
    """The losses of the first batch. Raises RuntimeError where sides that compute the same differ."""
    losses = {name: float(side.loss(0).detach()) for name, side in sides.items()}
    expected = losses["reft_kernels"]
    for name, loss in losses.items():
        edited = name == "pyreft" or name.startswith("reft_kernels")
        wanted = expected if edited else losses["floor"]
        if name != "adapters" and abs(loss - wanted) > TOLERANCE[dtype] * abs(wanted):
            raise RuntimeError(f"{name} computes another loss than it should: {losses}")
    for name in ("reft_kernels", "adapters"):
        if name in losses and abs(losses[name] - losses["floor"]) < 1e-4 * abs(losses["floor"]):
            raise RuntimeError(f"the edits of {name} change nothing: {losses}")
    return losses


def measure(arguments: argparse.Namespace, base: Any, positions: str) -> dict[str, Any]:
    """All sides of the job with these positions."""
    pairs = read_pairs(arguments, base.config.vocab_size, base.config.eos_token_id)
    batches = [
        {name: value.to(arguments.device) for name, value in batch.items()}
        for batch in make_batches(pairs, positions, base.config.num_hidden_layers, arguments.batch)
    ]
    torch.manual_seed(arguments.seed)
    sides, missing = build(Job(base, batches, positions, arguments.rank, arguments.lr), arguments.without)
    losses = compare_losses(sides, arguments.dtype)
    for side in sides.values():
        if side.forward_backward is not None:  # a graph for every batch, which is not a step's time
            for index in [*range(len(batches))] * 2:
                side.step(index)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    filling = []
    began, total = time.perf_counter(), arguments.warmup + len(batches) + arguments.rounds
    for number in range(-arguments.warmup - len(batches), arguments.rounds):
        # The first rounds fill the cache, batch by batch, and warm everybody up.
        for name, side in sides.items():
            if number < -arguments.warmup and side.cache is None:
                continue
            took = milliseconds(side, number % len(batches), arguments.device)
            if number >= 0:
                samples[name].append(took)
            elif number < -arguments.warmup:
                filling.append(took)
        done = number + 1 + arguments.warmup + len(batches)
        left = (time.perf_counter() - began) / done * (total - done)
        print(f"{positions}: round {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
    found = {name: summary(side, samples[name], samples["floor"]) for name, side in sides.items()}
    cached = sides.get("reft_kernels_cached")
    if cached is not None:
        stats = cached.cache.stats
        found["reft_kernels_cached"] |= {
            "ms_of_a_step_that_fills": statistics.median(filling),
            "saved_fraction": stats.saved_fraction,
            "kept_mib": stats.bytes / 2**20,
        }
    return {"first_loss": losses, "missing": missing, "tokens": describe_tokens(batches), "sides": found}


def milliseconds(side: Side, index: int, device: str) -> float:
    start = time.perf_counter()
    side.step(index)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def describe_tokens(batches: Sequence[Batch]) -> dict[str, Any]:
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    return {
        "batches": len(batches),
        "rows": len(lengths),
        "mean_length": statistics.mean(lengths),
        "longest": max(lengths),
        "labels": sum(int((batch["labels"] != -100).sum()) for batch in batches),
    }


def summary(side: Side, samples: list[float], floor: list[float]) -> dict[str, Any]:
    return {
        "ms": statistics.median(samples),
        "quartiles": statistics.quantiles(samples, n=4, method="inclusive")[::2],
        "steps_per_second": 1e3 / statistics.median(samples),
        "over_floor": statistics.median(a / b for a, b in zip(samples, floor, strict=True)),
        "parameters": sum(parameter.numel() for parameter in side.parameters),
        "samples_ms": [round(value, 3) for value in samples],
    }


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": machine.device_name(torch.device(arguments.device)),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": machine.commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": arguments.model_name,
        "dtype": arguments.dtype,
        "adapter": f"LoReFT, all layers, rank {arguments.rank}, tied, fp32; LoRA of that rank",
        "data": "generated, lengths of ARC-Easy" if arguments.data is None else str(Path(*arguments.data.parts[-2:])),
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
    }


def print_table(positions: str, found: dict[str, Any]) -> None:
    print(f"{positions:<22}{'steps/s':>9}{'ms':>10}{'quartiles':>20}{'over floor':>12}{'parameters':>12}")
    for name, row in found["sides"].items():
        low, high = row["quartiles"]
        print(
            f"{name:<22}{row['steps_per_second']:>9.3f}{row['ms']:>10.1f}{f'{low:.1f} to {high:.1f}':>20}"
            f"{row['over_floor']:>12.3f}{row['parameters']:>12,}"
        )
    for name, reason in found["missing"].items():
        print(f"without {name}: {reason}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Steps per second of every side, a panel for each choice of positions; whiskers are quartiles."""
    from matplotlib.figure import Figure

    jobs, about = report["jobs"], report["environment"]
    figure = Figure(figsize=(5.6 * len(jobs) + 1, 4.1), layout="constrained")
    panels = figure.subplots(1, len(jobs), squeeze=False, sharey=True)[0]
    names = [name for name in BUILDERS if any(name in job["sides"] for job in jobs.values())]
    for axis, (positions, job) in zip(panels, jobs.items(), strict=True):
        rows = [(place, job["sides"][name]) for place, name in enumerate(names) if name in job["sides"]]
        places = [place for place, _ in rows]
        rates = [row["steps_per_second"] for _, row in rows]
        # A longer step is a lower rate.
        spread = [
            [rate - 1e3 / row["quartiles"][1] for rate, (_, row) in zip(rates, rows, strict=True)],
            [1e3 / row["quartiles"][0] - rate for rate, (_, row) in zip(rates, rows, strict=True)],
        ]
        axis.barh(
            places, rates, xerr=spread, height=0.62, color=[COLOURS.get(names[place], OURS) for place in places],
            error_kw={"linewidth": 1, "capsize": 2, "ecolor": "#4a5568"},
        )  # fmt: skip
        for place, rate, over in zip(places, rates, spread[1], strict=True):
            axis.annotate(f"{rate:.3g}", (rate + over, place), (4, 0), textcoords="offset points", va="center")
        axis.axvline(job["sides"]["floor"]["steps_per_second"], color="#4a5568", linewidth=1, linestyle=":")
        axis.set_xlim(0, 1.18 * max(rate + over for rate, over in zip(rates, spread[1], strict=True)))
        axis.set_title(f"positions {positions}", fontsize=10)
        axis.set_xlabel("training steps per second (median); dotted: the floor")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [name.replace("_", " ").replace("reft kernels", "reft_kernels")
                                             for name in names])  # fmt: skip
    panels[0].invert_yaxis()
    tokens = next(iter(jobs.values()))["tokens"]
    figure.suptitle(
        f"{about['model']}, {about['dtype']}, {about['adapter']}\n{about['batch']} rows a step, "
        f"{tokens['mean_length']:.0f} tokens a row on average ({about['data']}); {about['device']}, "
        f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}",
        fontsize=9,
    )
    store.replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="commonsense rows, .jsonl or .jsonl.gz; generated tokens by default")
    parser.add_argument("--model", help="a folder of save_pretrained, with its tokenizer; SmolLM2-135M by default")
    parser.add_argument(
        "--random", action="store_true", help="SmolLM2-135M with random weights: needs no package with the model"
    )
    parser.add_argument("--tiny", action="store_true", help="a random Llama of two layers, to see that all of it works")
    parser.add_argument("--positions", nargs="+", default=["l7", "f7+l7"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=3, help="different batches, taken by turns")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--lr", type=float, default=9e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=tuple(TOLERANCE))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--without", nargs="+", default=[], choices=[*BUILDERS], metavar="SIDE", help="leave out sides")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if {"floor", "reft_kernels"} & set(arguments.without):
        parser.error("--without: floor and reft_kernels are what the others are compared with")
    if (arguments.tiny or arguments.random) and arguments.data is not None:
        parser.error("--tiny, --random: have no tokenizer for the rows of --data")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: no such file")
    arguments.model_name = "SmolLM2-135M (dequantised Q4_1)" if arguments.model is None else Path(arguments.model).name
    if arguments.random:
        arguments.model_name = "SmolLM2-135M (random weights)"
    elif arguments.tiny:
        arguments.model_name = "random Llama, 2 layers, width 32"
    elif arguments.model is None:
        from benchmarks.smollm2 import smollm2_folder

        arguments.model = smollm2_folder()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"environment": environment(arguments), "jobs": {}}
    base = base_model(arguments)
    for positions in arguments.positions:
        found = measure(arguments, base, positions)
        report["jobs"][positions] = found
        print_table(positions, found)
        store.write_json(arguments.out, report)
    picture = arguments.out.with_suffix(".png")
    plot(report, picture)
    print(f"\n{arguments.out}\n{picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
