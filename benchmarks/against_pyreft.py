"""One training step of SmolLM2-135M, all 30 layers edited by LoReFT: stock pyreft against reft_kernels.

    pip install as requirements-pyreft.txt says, then
    python -m benchmarks.against_pyreft [--rounds 9] [--threads 2] [--batch 4] [--tokens 128] [--rank 8]

Four sides take turns in one process, each on a copy of its own of the same fp32 model and on the same batch:

    frozen      no edit; backpropagates as far as the others do, to the output of the first layer
    pyreft      the authors' pyreft on pyvene, unit_locations as lists, as its trainer passes them
    rewritten   benchmarks.pyreft_peer, the lower bound of pyreft that the demo is timed against
    ours        reft_kernels, positions found from the mask and the labels

A step is forward with loss, backward, AdamW and zero_grad: without the optimiser R would not change, and ours would not
compute it. f7+l7, prefix and suffix tied; the first half of every row is prompt. The losses of the first step are
compared before anything is timed. Times are medians in milliseconds; "over frozen" is the ratio of a side's step to the
frozen one of the same round, again a median.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.pyreft_peer import Peer
from benchmarks.smollm2 import smollm2_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "against_pyreft_cpu.json"
POSITIONS = "f7+l7"
PHASES = ("forward", "backward", "optimizer")
SIDES = ("frozen", "pyreft", "rewritten", "ours")

Phase = Callable[[], Tensor]


def training_batch(vocabulary: int, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens [B, S] without padding; labels on the second half."""
    ids = torch.randint(vocabulary, (batch, tokens))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build(side: str, inputs: dict[str, Tensor], rank: int) -> tuple[Phase, nn.Module | None]:
    """A function that runs the forward and returns the loss, and the module whose parameters are trained."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    model.requires_grad_(False)
    layers = range(model.config.num_hidden_layers)
    d = model.config.hidden_size
    batch, tokens = inputs["input_ids"].shape
    first, last = 7, 7
    prompt = tokens // 2
    row = [*range(first), *range(prompt - last, prompt)]

    if side == "frozen":
        model.model.layers[0].register_forward_hook(lambda _module, _args, h: h.detach().requires_grad_())
        return lambda: model(**inputs, use_cache=False).loss, None

    if side == "rewritten":
        peer = Peer(model, list(layers), rank)
        peer.positions = [row] * batch
        return lambda: model(**inputs, use_cache=False).loss, peer

    if side == "pyreft":
        import pyreft

        config = pyreft.ReftConfig(
            representations=[
                {
                    "layer": layer,
                    "component": "block_output",
                    "low_rank_dimension": rank,
                    "intervention": pyreft.LoreftIntervention(
                        embed_dim=d, low_rank_dimension=rank, dtype=torch.float32
                    ),
                }
                for layer in layers
            ]
        )
        stock = pyreft.get_reft_model(model, config)
        where = {"sources->base": (None, [[row] * batch for _ in layers])}
        base = {key: inputs[key] for key in ("input_ids", "attention_mask")}

        def stock_loss() -> Tensor:
            _, output = stock(base, unit_locations=where, labels=inputs["labels"], use_cache=False)
            return output.loss  # type: ignore[no-any-return]

        return stock_loss, stock.interventions

    import reft_kernels

    config = reft_kernels.ReftConfig(method="loreft", layers="all", rank=rank, positions=POSITIONS)
    ours = reft_kernels.get_reft_model(model, config)
    return lambda: ours(**inputs, use_cache=False).loss, ours.interventions


def same_weights(trained: dict[str, nn.Module | None]) -> None:
    """Gives every side the initial weights of stock's interventions."""
    with torch.no_grad():
        for theirs, ours, peer in zip(
            trained["pyreft"].values(), trained["ours"].values(), trained["rewritten"].edits, strict=True
        ):
            rotation = theirs.rotate_layer.weight.detach().clone()
            for side in (ours, peer):
                side.rotate_layer.weight = rotation
                side.learned_source.load_state_dict(theirs.learned_source.state_dict())


def step(loss: Phase, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Milliseconds of the phases of one training step."""
    ticks = [time.perf_counter()]
    value = loss()
    ticks.append(time.perf_counter())
    value.backward()
    ticks.append(time.perf_counter())
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    ticks.append(time.perf_counter())
    return {phase: 1e3 * (after - before) for phase, before, after in zip(PHASES, ticks[:-1], ticks[1:], strict=True)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    inputs = training_batch(49152, arguments.batch, arguments.tokens)
    built = {side: build(side, inputs, arguments.rank) for side in SIDES}
    losses = {side: loss for side, (loss, _) in built.items()}
    trained = {side: module for side, (_, module) in built.items()}
    same_weights(trained)
    found = {side: float(losses[side]().detach()) for side in SIDES}
    for side in ("rewritten", "ours"):
        if abs(found[side] - found["pyreft"]) > 1e-4 * found["pyreft"]:
            raise RuntimeError(f"the sides do not compute the same loss: {found}")
    if abs(found["frozen"] - found["pyreft"]) < 1e-3 * found["pyreft"]:
        raise RuntimeError(f"the edits change nothing: {found}")
    optimizers = {
        side: module and torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
        for side, module in trained.items()
    }
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for round_number in range(-arguments.warmup, arguments.rounds):
        for side in SIDES:
            times = step(losses[side], optimizers[side])
            if round_number >= 0:
                samples[side].append(times)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"first_loss": found, "sides": {side: summary(side, samples) for side in SIDES}}


def summary(side: str, samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians in ms, the quartiles of the step, and the step over the frozen one of the same round."""
    rows = samples[side]
    steps = [sum(row.values()) for row in rows]
    frozen = [sum(row.values()) for row in samples["frozen"]]
    return {
        **{phase: statistics.median(row[phase] for row in rows) for phase in PHASES},
        "step": statistics.median(steps),
        "step_quartiles": statistics.quantiles(steps, n=4)[::2],
        "over_frozen": statistics.median(a / b for a, b in zip(steps, frozen, strict=True)),
        "added": statistics.median(a - b for a, b in zip(steps, frozen, strict=True)),
    }


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "pyreft", "pyvene", "reft_kernels"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = str(__import__(package).__version__)
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": "SmolLM2-135M, fp32, dequantised Q4_1",
        "intervention": f"LoReFT, 30 layers, rank {arguments.rank}, {POSITIONS}, tied, fp32",
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "unit": "ms, medians",
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with "+" where files of the package differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "reft_kernels"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def print_table(sides: dict[str, Any]) -> None:
    columns = (*PHASES, "step", "added", "over_frozen")
    print(f"{'ms':<12}" + "".join(f"{name.replace('_', ' '):>13}" for name in columns))
    for side, row in sides.items():
        cells = (f"{row[name]:>13.{3 if name == 'over_frozen' else 1}f}" for name in columns)
        print(f"{side:<12}" + "".join(cells))
    ratio = sides["pyreft"]["step"] / sides["ours"]["step"]
    print(f"\npyreft / ours, whole step: {ratio:.2f}")
    if sides["ours"]["added"] > 0:
        print(f"pyreft / ours, added to the frozen step: {sides['pyreft']['added'] / sides['ours']['added']:.1f}")


def plot(report: dict[str, Any], path: Path) -> None:
    """One bar a side: the frozen model's step in grey, what the edits add in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides, environment = report["sides"], report["environment"]
    names = {"ours": "reft_kernels", "pyreft": f"pyreft {environment['versions']['pyreft']}"}
    colours = {"ours": "#2b6cb0", "pyreft": "#dd6b20"}
    own = sides["frozen"]["step"]
    figure, axes = plt.subplots(figsize=(8, 2.4), layout="constrained")
    axes.barh("frozen model", own, color="#cbd5e0", height=0.6)
    axes.annotate(f"{own:,.0f} ms", (own, 0), (5, 0), textcoords="offset points", va="center")
    for row, (side, name) in enumerate(names.items(), start=1):
        added = sides[side]["added"]
        axes.barh(name, own, color="#cbd5e0", height=0.6)
        axes.barh(name, max(added, 0), left=own, color=colours[side], height=0.6)
        end = own + max(added, 0)
        axes.annotate(f"{added:+,.0f} ms", (end, row), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * (own + max(sides["pyreft"]["added"], 0)))
    axes.set_xlabel("ms per training step (median)")
    axes.set_title(
        f"SmolLM2-135M, LoReFT on all 30 layers, {environment['batch']} x {environment['tokens']} tokens, "
        f"{environment['threads']} CPU threads",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_pyreft", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyreft  # noqa: F401
    except ImportError as error:
        print(f"stock pyreft cannot be imported ({error}): see requirements-pyreft.txt", file=sys.stderr)
        return 1
    report = {"environment": environment(arguments), **measure(arguments)}
    print_table(report["sides"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    picture = arguments.out.with_suffix(".png")
    plot(report, picture)
    print(f"\n{arguments.out}\n{picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
