"""What an epoch costs where what never changes is kept, and where it is not: LoReFT on the suffix of the prompt.

    python -m benchmarks.frozen_cache --data train.jsonl.gz [--examples 200] [--epochs 6] [--batch 8] [--place memory]

uncached  every step runs all tokens of its rows through all blocks, forward and backward
cached    FrozenCache: the tokens from the first edited one on, through the blocks after the first edit

Both train an adapter of their own from the same weights over the same model, on the same batches in the same order, and
take turns, an epoch each. Logits are computed for the columns that predict a target, on both sides. The losses of all
steps are compared. Memory is the peak of what one step's forward and backward allocates above what was there before
(what is kept not included, which is a column of its own). The model is SmolLM2-135M, or a folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks.against_pyreft import ROOT, commit, cpu_name
from benchmarks.drop_in import Side, peak_memory
from benchmarks.smollm2 import smollm2_folder
from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import (
    FrozenCache,
    SuffixCollator,
    SupervisedDataset,
    build_prompt,
    make_supervised_data_module,
    read_jsonl,
)
from reft_kernels.training.target_columns import COLUMNS, TargetColumns

RESULTS = ROOT / "benchmarks" / "results" / "frozen_cache_cpu.json"
SIDES = ("uncached", "cached")


@dataclass
class Trained:
    """An adapter in training."""

    model: Any
    collate: TargetColumns
    cache: FrozenCache | None
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean over the batch's targets."""
        inputs = dict(batch)
        columns = inputs.pop(COLUMNS)
        inputs["logits_to_keep"] = columns
        inputs["shift_labels"] = inputs["labels"][:, 1:].index_select(1, columns)
        if self.cache is None:
            return self.model(**inputs, use_cache=False).loss  # type: ignore[no-any-return]
        with self.cache.apply(inputs) as cut:
            return self.model(**cut).loss  # type: ignore[no-any-return]


def base_model(arguments: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = getattr(torch, arguments.dtype)
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)


def made(arguments: argparse.Namespace, name: str, base: Any, folder: str) -> tuple[Trained, SupervisedDataset]:
    from transformers import AutoTokenizer

    config = ReftConfig(method="loreft", layers="all", rank=arguments.rank, positions=arguments.positions)
    torch.manual_seed(arguments.seed)
    model = get_reft_model(base, config).train()
    rows = read_jsonl(arguments.data, max_examples=arguments.examples)
    prompts = [build_prompt(row.instruction, row.input) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    module = make_supervised_data_module(tokenizer, model, prompts, [str(row.output) for row in rows])
    cache, collate = None, module["data_collator"]
    if name == "cached":
        where = folder if arguments.place == "disk" else None
        cache = FrozenCache(model, arguments.place, budget=arguments.budget, folder=where)
        collate = SuffixCollator(collate)
    optimizer = torch.optim.AdamW(model.interventions.parameters(), lr=arguments.lr, weight_decay=0.0)
    return Trained(model, TargetColumns(collate), cache, optimizer), module["train_dataset"]


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def run_epoch(side: Trained, batches: list[list[dict[str, Tensor]]], device: torch.device) -> None:
    losses = []
    start = time.perf_counter()
    for rows in batches:
        loss = side.loss(on_device(side.collate(rows), device))
        loss.backward()
        side.optimizer.step()
        side.optimizer.zero_grad()
        losses.append(loss.detach())
    side.losses += torch.stack(losses).tolist()  # which a GPU has to finish for
    side.seconds.append(time.perf_counter() - start)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    base = base_model(arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Trained] = {}
        for name in SIDES:
            sides[name], data = made(arguments, name, base, folder)
        for epoch in range(arguments.epochs):
            order = torch.randperm(len(data), generator=generator).tolist()
            items = [data[index] for index in order]
            batches = [items[k : k + arguments.batch] for k in range(0, len(items), arguments.batch)]
            for side in sides.values():
                run_epoch(side, batches, device)
            took = time.perf_counter() - began
            left = took / (epoch + 1) * (arguments.epochs - epoch - 1)
            times = ", ".join(f"{name} {side.seconds[-1]:.1f} s" for name, side in sides.items())
            print(f"epoch {epoch + 1} of {arguments.epochs}: {times}; {left:.0f} s left", file=sys.stderr, flush=True)
        first, second = sides.values()
        apart = max(abs(a - b) / abs(a) for a, b in zip(first.losses, second.losses, strict=True))
        assert second.cache is not None
        stats = replace(second.cache.stats)  # before the steps whose memory is measured
        found = {name: summary(side, batches[0], device) for name, side in sides.items()}
    return {
        "sides": found,
        "largest_relative_difference_of_losses": apart,
        "cache": {**asdict(stats), "saved_fraction": stats.saved_fraction},
        "tokens": {"rows": len(data), "mean_length": statistics.mean(data.lengths), "longest": max(data.lengths)},
        "speedup_of_a_later_epoch": found["uncached"]["later_epoch_s"] / found["cached"]["later_epoch_s"],
        "speedup_of_all_epochs": sum(first.seconds) / sum(second.seconds),
    }


def summary(side: Trained, rows: list[dict[str, Tensor]], device: torch.device) -> dict[str, Any]:
    batch = on_device(side.collate(rows), device)
    step = Side(lambda: side.loss(batch), list(side.model.interventions.values()))
    return {
        "epoch_s": side.seconds,
        "first_epoch_s": side.seconds[0],
        "later_epoch_s": statistics.median(side.seconds[1:]),
        "peak_mib_of_a_step": peak_memory(step, device),
        "losses": side.losses,
    }


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.device(arguments.device).type == "cuda" else cpu_name()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        },
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": arguments.model_name,
        "dtype": arguments.dtype,
        "intervention": f"LoReFT, all layers, rank {arguments.rank}, {arguments.positions}, tied, fp32",
        "data": "/".join(Path(arguments.data).resolve().parts[-2:]),
        "batch": arguments.batch,
        "lr": arguments.lr,
        "place": arguments.place,
        "budget": arguments.budget,
    }


def print_table(report: dict[str, Any]) -> None:
    print(f"{'':<10}{'first epoch':>13}{'later epoch':>13}{'peak of a step':>16}{'kept':>12}")
    for name, row in report["sides"].items():
        kept = report["cache"]["bytes"] / 2**20 if name == "cached" else 0.0
        print(
            f"{name:<10}{row['first_epoch_s']:>11.1f} s{row['later_epoch_s']:>11.1f} s"
            f"{row['peak_mib_of_a_step']:>12.1f} MiB{kept:>8.0f} MiB"
        )
    print(
        f"a later epoch is {report['speedup_of_a_later_epoch']:.2f} times as fast, all of them "
        f"{report['speedup_of_all_epochs']:.2f} times; {report['cache']['saved_fraction']:.1%} of tokens times blocks "
        f"never change; losses differ by {report['largest_relative_difference_of_losses']:.1e} at most (relative)"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds of every epoch, and both curves of losses with their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"uncached": "#dd6b20", "cached": "#2b6cb0"}
    figure, (times, curve, apart) = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    for place, (name, row) in enumerate(report["sides"].items()):
        seconds = row["epoch_s"]
        columns = [epoch + 1 + 0.38 * (place - 0.5) for epoch in range(len(seconds))]
        times.bar(columns, seconds, width=0.36, label=name, color=colours[name])
        curve.plot(
            row["losses"], color=colours[name], label=name, linewidth=3 - 2 * place, alpha=0.5 + 0.5 * place,
        )  # fmt: skip
    times.set(title="seconds an epoch", xlabel="epoch", xticks=range(1, len(seconds) + 1))
    curve.set(title="loss", xlabel="step")
    one, other = (report["sides"][name]["losses"] for name in SIDES)
    apart.semilogy([max(abs(a - b) / abs(a), 1e-12) for a, b in zip(one, other, strict=True)], color="#4a5568")
    apart.set(title="relative difference of the losses", xlabel="step")
    for axis in (times, curve, apart):
        axis.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False)
    environment, rows = report["environment"], report["tokens"]["rows"]
    figure.suptitle(
        f"{environment['model']}, {environment['intervention']}; {rows} rows of {environment['data']}, "
        f"{environment['device']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen_cache", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="rows as .jsonl or .jsonl.gz")
    parser.add_argument("--model", help="a folder of save_pretrained, with its tokenizer")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--positions", default="l7")
    parser.add_argument("--lr", type=float, default=9e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--place", default="memory", choices=("memory", "pinned", "disk"))
    parser.add_argument("--budget", type=int, help="bytes to keep; all by default")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2: the first one computes what the others use")
    arguments.model_name = "SmolLM2-135M (dequantised Q4_1)" if arguments.model is None else Path(arguments.model).name
    arguments.model = arguments.model or smollm2_folder()
    report = {"environment": environment(arguments), **measure(arguments)}
    print_table(report)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    plot(report, arguments.out.with_suffix(".png"))
    print(f"\n{arguments.out}\n{arguments.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
