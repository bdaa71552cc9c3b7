"""One model, 30 layers edited by LoReFT, in five ways: what each costs in time, in operations and in memory.

    pip install as requirements-peers.txt says, then
    python -m benchmarks.drop_in [--rounds 9] [--threads 2] [--batch 4] [--tokens 128] [--rank 8] [--device cuda]

    none         the base model, which backpropagates as far as the others do, to the output of its first layer
    pyreft       the authors' pyreft on pyvene
    patched      the same pyreft after reft_kernels.patch_pyreft()
    reft_kernels ReftModel
    adapters     AdapterHub's LoReFT

All sides edit the same tokens (the first and the last seven of every row, tied) of a copy of their own of the same
model, with the same weights; their losses are compared first. They take turns; times are medians. Operations are what
PyTorch dispatches below autograd, views included. Memory is the peak of what one forward and backward allocates above
what was allocated before (on a CPU from the profiler's record of every allocation). Sides whose package is not there
are left out. R is computed anew at every measurement, as after an optimiser's step.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.against_pyreft import ROOT, commit, cpu_name
from benchmarks.smollm2 import random_smollm2, smollm2_folder

RESULTS = ROOT / "benchmarks" / "results" / "drop_in_cpu.json"
ENDS = 7
SIDES = ("none", "pyreft", "patched", "reft_kernels", "adapters")
# The sizes of SmolLM2-135M.


@dataclass
class Side:
    """One way to run the model.

    ``loss`` runs the forward; ``edits`` holds what is trained, one module a layer; ``forget`` makes R due again.
    """

    loss: Callable[[], Tensor]
    edits: list[nn.Module]
    forget: Callable[[], None] = lambda: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    samples: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "forward_backward": []})


def base_model(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaForCausalLM

    if arguments.random:
        model = random_smollm2(0)
        return model.requires_grad_(False).to(arguments.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    return model.requires_grad_(False).to(arguments.device)


def located(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    row = [*range(ENDS), *range(arguments.tokens - ENDS, arguments.tokens)]
    return {"sources->base": (None, [[row] * arguments.batch for _ in range(count)])}


def none(arguments: argparse.Namespace, inputs: dict[str, Tensor]) -> Side:
    model = base_model(arguments)

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = h.detach().requires_grad_(torch.is_grad_enabled())
        return (h, *output[1:]) if isinstance(output, tuple) else h

    model.model.layers[0].register_forward_hook(cut)
    return Side(lambda: model(**inputs, use_cache=False).loss, [])


def pyreft(arguments: argparse.Namespace, inputs: dict[str, Tensor]) -> Side:
    import pyreft

    model = base_model(arguments)
    count, d = model.config.num_hidden_layers, model.config.hidden_size
    entries = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": arguments.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=d, low_rank_dimension=arguments.rank, dtype=torch.float32
            ),
        }
        for layer in range(count)
    ]
    edited = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=entries))
    where = located(arguments, count)
    base = {key: inputs[key] for key in ("input_ids", "attention_mask")}

    def loss() -> Tensor:
        _, output = edited(base, unit_locations=where, labels=inputs["labels"], use_cache=False)
        return output.loss  # type: ignore[no-any-return]

    return Side(loss, list(edited.interventions.values()))


@contextlib.contextmanager
def patched_pyreft() -> Iterator[None]:
    from reft_kernels import patch_pyreft, unpatch_pyreft

    patch_pyreft()
    try:
        yield
    finally:
        unpatch_pyreft()


def patched(arguments: argparse.Namespace, inputs: dict[str, Tensor]) -> Side:
    with patched_pyreft():
        side = pyreft(arguments, inputs)
    side.around, side.forget = patched_pyreft, lambda: forget(side.edits)
    return side


def reft_kernels(arguments: argparse.Namespace, inputs: dict[str, Tensor]) -> Side:
    import reft_kernels

    config = reft_kernels.ReftConfig(method="loreft", layers="all", rank=arguments.rank)
    edited = reft_kernels.get_reft_model(base_model(arguments), config)
    where = located(arguments, len(edited.interventions))
    modules = list(edited.interventions.values())

    def loss() -> Tensor:
        return edited(**inputs, unit_locations=where, use_cache=False).loss  # type: ignore[no-any-return]

    return Side(loss, modules, lambda: forget(modules))


def forget(modules: list[nn.Module]) -> None:
    for module in modules:
        module.rotate_layer.rows.invalidate()


def adapters(arguments: argparse.Namespace, inputs: dict[str, Tensor]) -> Side:
    import adapters

    model = base_model(arguments)
    adapters.init(model)
    kind = adapters.LoReftConfig(
        r=arguments.rank, prefix_positions=ENDS, suffix_positions=ENDS, tied_weights=True, dropout=0.0
    )
    model.add_adapter("loreft", config=kind)
    model.train_adapter("loreft")
    model.eval().to(arguments.device)
    units = [module for module in model.modules() if type(module).__name__ == "ReftUnit"]
    return Side(lambda: model(**inputs, use_cache=False).loss, units)


@torch.no_grad()
def share_weights(sides: dict[str, Side]) -> None:
    """Every side gets the same R, W and b."""
    count = len(sides["reft_kernels"].edits)
    for layer in range(count):
        ours = sides["reft_kernels"].edits[layer]
        R = ours.rotate_layer.weight.detach().clone()  # [d, r]
        source = ours.learned_source.state_dict()
        for side in sides.values():
            if side.edits:
                module = side.edits[layer]
                module.learned_source.load_state_dict(source)
                if hasattr(module, "projection"):
                    module.projection.weight = R.T.contiguous()
                else:
                    module.rotate_layer.weight = R


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(side: Side) -> dict[str, int]:
    """What is dispatched in a forward without gradient, and in a forward and backward."""
    found = {}
    for name, run in phases(side).items():
        side.forget()
        with side.around(), _Counted() as counted:
            run()
        found[name] = counted.count
    return found


def phases(side: Side) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            side.loss()

    def forward_backward() -> None:
        side.loss().backward()
        for module in side.edits:
            module.zero_grad(set_to_none=True)

    return {"forward": forward, "forward_backward": forward_backward}


def peak_memory(side: Side, device: torch.device) -> float:
    """MiB that one forward and backward allocates at its peak, above what was there before."""
    gc.collect()
    side.forget()
    run = phases(side)["forward_backward"]
    with side.around():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    records.sort(key=lambda event: event["ts"])
    allocated = peak = 0
    for event in records:
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak / 2**20


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    ids = torch.randint(49152, (arguments.batch, arguments.tokens), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    sides: dict[str, Side] = {}
    missing = {}
    for name in SIDES:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                sides[name] = globals()[name](arguments, inputs)
        except ImportError as error:
            missing[name] = str(error)
            print(f"without {name}: {error}", file=sys.stderr)
    share_weights(sides)
    losses = {}
    for name, side in sides.items():
        with side.around():
            losses[name] = float(side.loss().detach())
    expected = losses["reft_kernels"]
    odd = {name: loss for name, loss in losses.items() if name != "none" and abs(loss - expected) > 1e-4 * expected}
    if odd or abs(losses["none"] - expected) < 1e-3 * expected:
        raise RuntimeError(f"the sides do not compute the same loss, or the edits change nothing: {losses}")
    for number in range(-arguments.warmup, arguments.rounds):
        for side in sides.values():
            for phase, run in phases(side).items():
                side.forget()
                with side.around():
                    took = milliseconds(run, device)
                if number >= 0:
                    side.samples[phase].append(took)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "loss": losses,
        "missing": missing,
        "sides": {name: summary(name, sides, device) for name in sides},
    }


def summary(name: str, sides: dict[str, Side], device: torch.device) -> dict[str, Any]:
    side, plain = sides[name], sides["none"]
    found: dict[str, Any] = {}
    for phase, samples in side.samples.items():
        own = plain.samples[phase]
        found[phase] = {
            "ms": statistics.median(samples),
            "quartiles": statistics.quantiles(samples, n=4)[::2],
            "over_none": statistics.median(a / b for a, b in zip(samples, own, strict=True)),
            "added_ms": statistics.median(a - b for a, b in zip(samples, own, strict=True)),
        }
    return {**found, "operations": operations(side), "peak_mib": peak_memory(side, device)}


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "pyreft", "pyvene", "adapters"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = torch.cuda.get_device_name() if torch.device(arguments.device).type == "cuda" else cpu_name()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "model": "SmolLM2-135M, fp32, " + ("random weights" if arguments.random else "dequantised Q4_1"),
        "intervention": f"LoReFT, 30 layers, rank {arguments.rank}, f{ENDS}+l{ENDS}, tied, fp32",
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
    }


def print_table(sides: dict[str, Any]) -> None:
    print(
        f"{'':<13}{'forward':>12}{'added':>10}{'with backward':>15}{'added':>10}{'over none':>11}"
        f"{'ops fwd':>9}{'ops both':>10}{'peak MiB':>10}"
    )
    for name, row in sides.items():
        one, both, ops = row["forward"], row["forward_backward"], row["operations"]
        print(
            f"{name:<13}{one['ms']:>9.1f} ms{one['added_ms']:>+10.1f}{both['ms']:>12.1f} ms{both['added_ms']:>+10.1f}"
            f"{both['over_none']:>11.3f}{ops['forward']:>9}{ops['forward_backward']:>10}{row['peak_mib']:>10.1f}"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """Added time, operations and memory of every side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    sides, environment = report["sides"], report["environment"]
    plain = sides["none"]
    names = [name for name in sides if name != "none"]
    panels = [
        ("added to forward + backward, ms", [sides[name]["forward_backward"]["added_ms"] for name in names]),
        (
            "operations added",
            [sides[name]["operations"]["forward_backward"] - plain["operations"]["forward_backward"] for name in names],
        ),
        ("peak memory added, MiB", [sides[name]["peak_mib"] - plain["peak_mib"] for name in names]),
    ]
    colours = {"reft_kernels": "#2b6cb0", "patched": "#63b3ed", "pyreft": "#dd6b20", "adapters": "#a0aec0"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained", sharey=True)
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=[colours[name] for name in names], height=0.6)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4)
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axis.set_xlim(min(0.0, *values), 1.25 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"SmolLM2-135M, LoReFT on all 30 layers, {environment['batch']} x {environment['tokens']} tokens, "
        f"{environment['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", action="store_true", help="random weights: needs no package with the model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    report = {"environment": environment(arguments), **measure(arguments)}
    print_table(report["sides"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    plot(report, arguments.out.with_suffix(".png"))
    print(f"\n{arguments.out}\n{arguments.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
