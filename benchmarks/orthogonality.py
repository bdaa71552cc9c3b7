"""SmolLM2-135M learns a task with each way to keep R's rows orthonormal, and as pyreft computes it: loss and error.

    python -m benchmarks.orthogonality --data train.jsonl.gz --test test.jsonl.gz [--steps 100] [--seeds 42 43 44]

householder, polar (by StiefelAdamW), none, and pyreft (``benchmarks.pyreft_peer``: torch's own parametrisation) train
the same edits, f7+l7 on all layers, from the same R, W and b on the same batches, with AdamW at one learning rate
(linear warm-up, then linear decay), for every seed. Kept are the training loss of each step, |R R^T - I| of the worst
layer, and the loss on held-out rows before and after. Rows are those of ``python -m reft_kernels train``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.ops import machine, store
from benchmarks.pyreft_peer import Peer
from benchmarks.smollm2 import smollm2_folder

RESULTS = machine.ROOT / "benchmarks" / "results"
KINDS = ("householder", "polar", "none", "pyreft")
POSITIONS = "f7+l7"
RANK = 8


class Side(NamedTuple):
    """A model with edits: its loss on a batch, its trained parameters, and R of every layer."""

    loss: Any  # batch -> Tensor
    parameters: list[nn.Parameter]
    rows: Any  # () -> list of Tensor [r, d]


def main() -> int:
    """Trains, writes orthogonality.json and draws orthogonality.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orthogonality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="training rows, .jsonl or .jsonl.gz")
    parser.add_argument("--test", type=Path, required=True, help="held-out rows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=96, metavar="ROWS")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the runs that an earlier call has written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    path = options.out / "orthogonality.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if options.resume and path.exists() else {}
    total = len(options.kinds) * len(options.seeds) * options.steps
    with Progress() as progress:
        task = progress.add_task("training", total=total)
        for seed in options.seeds:
            for kind in options.kinds:
                if f"{kind} {seed}" in runs:
                    progress.advance(task, options.steps)
                    continue
                runs[f"{kind} {seed}"] = _run(kind, seed, options, lambda: progress.advance(task))
                _keep(runs, options)
    found = _keep(runs, options)
    draw(found, options.out / "orthogonality.png")
    _print(found)
    return 0


def _keep(runs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Writes what has been found so far."""
    found = {
        "what": __doc__.splitlines()[0],
        "environment": machine.environment(torch.device("cpu")),
        "model": "SmolLM2-135M, fp32, dequantised Q4_1",
        "task": options.data.parent.name,
        "settings": {name: getattr(options, name) for name in ("steps", "batch", "held_out", "lr", "threads")}
        | {"rank": RANK, "positions": POSITIONS, "layers": "all"},
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    store.write_json(options.out / "orthogonality.json", found)
    return found


def _run(kind: str, seed: int, options: argparse.Namespace, advance: Any) -> dict[str, Any]:
    from reft_kernels import StiefelAdamW

    torch.manual_seed(seed)
    side, train, test = _side(kind, options)
    make: Any = StiefelAdamW if kind == "polar" else torch.optim.AdamW
    optimizer = make(side.parameters, lr=options.lr, weight_decay=0.0)
    warm = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (options.steps - i) / (options.steps - warm + 1))
    )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    before = _held_out(side, test, options.batch)
    losses, errors, start = [], [], time.perf_counter()
    for step in range(options.steps):
        picked = [train[order[(step * options.batch + i) % len(order)]] for i in range(options.batch)]
        loss = side.loss(picked)
        loss.backward()
        nn.utils.clip_grad_norm_(side.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 5))
        errors.append(float(f"{_error(side.rows()):.3g}"))
        advance()
    seconds = time.perf_counter() - start
    return {
        "held_out": [round(before, 4), round(_held_out(side, test, options.batch), 4)],
        "seconds": round(seconds, 1),
        "loss": losses,
        "error": errors,
    }


def _side(kind: str, options: argparse.Namespace) -> tuple[Side, list[Any], list[Any]]:
    """A side and the examples, tokenised; every side of a seed starts from the same R, W and b."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from reft_kernels import ReftConfig, get_reft_model, make_supervised_data_module
    from reft_kernels.training.data import build_prompt, read_jsonl

    model = LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    config = ReftConfig(
        method="loreft", layers="all", rank=RANK, positions=POSITIONS,
        orthogonality="householder" if kind == "pyreft" else kind,
    )  # fmt: skip
    reft_model = get_reft_model(model, config)

    def examples(path: Path, count: int | None) -> tuple[list[Any], Any]:
        read = read_jsonl(path, max_examples=count)
        prompts = [build_prompt(one.instruction, one.input) for one in read]
        made = make_supervised_data_module(tokenizer, reft_model, prompts, [one.output or "" for one in read])
        return list(made["train_dataset"]), made["data_collator"]

    train, collator = examples(options.data, None)
    test, _ = examples(options.test, options.held_out)
    layers = list(reft_model.interventions.values())
    if kind != "pyreft":
        parameters = [p for p in reft_model.parameters() if p.requires_grad]
        rows = lambda: [one.rotate_layer.rows.weight for one in layers]  # noqa: E731
        return Side(lambda batch: reft_model(**collator(batch), use_cache=False).loss, parameters, rows), train, test

    starts = [one.edit_weights() for one in layers]
    reft_model.remove_hooks()
    peer = Peer(model, list(range(len(layers))), RANK)
    with torch.no_grad():
        for edit, start in zip(peer.edits, starts, strict=True):
            edit.rotate_layer.weight = start.R.T.contiguous()
            edit.learned_source.weight.copy_(start.W)
            edit.learned_source.bias.copy_(start.b)

    def loss(batch: Sequence[Any]) -> Tensor:
        made = dict(collator(batch))
        peer.positions = made.pop("intervention_locations")[:, 0].tolist()
        return model(**made, use_cache=False).loss  # type: ignore[no-any-return]

    rows = lambda: [edit.rotate_layer.weight.T for edit in peer.edits]  # noqa: E731
    return Side(loss, list(peer.parameters()), rows), train, test


@torch.no_grad()
def _held_out(side: Side, rows: Sequence[Any], batch: int) -> float:
    return statistics.mean(float(side.loss(rows[i : i + batch])) for i in range(0, len(rows), batch))


@torch.no_grad()
def _error(rows: Sequence[Tensor]) -> float:
    """max |R R^T - I| over all layers."""
    wide = torch.stack([R.double() for R in rows])
    return float((wide @ wide.mT - torch.eye(wide.shape[1], dtype=torch.float64)).abs().max())


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss and orthonormality error over the steps: mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(name.split()[0] for name in found["runs"]))
    for kind, colour in zip(kinds, ("tab:blue", "tab:orange", "tab:green", "tab:gray"), strict=False):
        runs = [run for name, run in found["runs"].items() if name.split()[0] == kind]
        steps = range(1, len(runs[0]["loss"]) + 1)
        for axes, what in ((left, "loss"), (right, "error")):
            values = [_smooth(run[what]) if what == "loss" else run[what] for run in runs]
            at_step = list(zip(*values, strict=True))
            style = "--" if kind == "pyreft" else "-"
            axes.plot(steps, [statistics.mean(v) for v in at_step], style, color=colour, label=kind, linewidth=1.6)
            axes.fill_between(steps, [min(v) for v in at_step], [max(v) for v in at_step], color=colour, alpha=0.15)
    left.set(
        xlabel="step", ylabel="training loss (mean of 5 steps)", title=f"{found['task']}, SmolLM2-135M, LoReFT r=8"
    )
    left.set_yscale("log")
    right.set(xlabel="step", ylabel="max |R Rᵀ − I|", title="distance from orthonormal rows, worst layer")
    right.set_yscale("log")
    left.legend()
    environment = found["environment"]
    taken = f"{len(found['runs']) // len(kinds)} seeds, range shaded; {environment['device']}, "
    taken += f"torch {environment['torch']}, commit {environment['commit']}"
    figure.text(0.995, 0.005, taken, ha="right", va="bottom", fontsize=7, color="gray")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    store.replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _print(found: dict[str, Any]) -> None:
    for name, run in found["runs"].items():
        before, after = run["held_out"]
        print(
            f"{name:16} held-out {before:.4f} -> {after:.4f}   last losses {statistics.mean(run['loss'][-10:]):.4f}   "
            f"max error {max(run['error']):.2g}   {run['seconds']:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
