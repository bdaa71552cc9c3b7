"""One rank-1 edit of one layer that holds a text: how many tokens it recites, by layer, rank and length (ReFT, F.1).

    python -m benchmarks.memorisation [--text FILE] [--layers 5 15 25] [--lengths 16 32 64 128 256] [--ranks 1]
                                      [--methods consreft] [--epochs 1000] [--lr 4e-3]

As in the ReFT paper's appendix F.1: h + Rᵀ(b − Rh) at the last token of the prompt `ALIC#ID1->`, in one layer, learns
the first N tokens of a text; AdamW, 1,000 epochs, learning rate 4e-3 falling linearly, no warm-up. A cell (method,
rank, layer, N) ends as soon as every token is the model's first choice, which cannot get any better. What counts are
the tokens that are right before the first that is not (prefix exact match), of the whole model without a cache, with
the text's own tokens as input: up to the first mistake that is what generation says.

The edit is the only thing that changes, and it comes after layer L: FrozenCache keeps what the blocks up to L make of
all tokens, and an epoch costs the blocks after L and the logits.

Finished cells are kept in the JSON and are not run again by a later call with the same text, model, seed and training;
lengths, layers, ranks and methods may be added. The default text is the beginning of Alice's Adventures in Wonderland
(Lewis Carroll, 1865, public domain), the paper's own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.ops import machine, store
from benchmarks.training_sides import for_targets
from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import FrozenCache
from reft_kernels.training.data import SupervisedCollator, encode_prompts
from reft_kernels.training.frozen_rows import suffix_batch
from reft_kernels.training.item_layout import ItemLayout
from reft_kernels.training.memorisation import recite

RESULTS = machine.ROOT / "benchmarks" / "results" / "memorisation_cpu.json"
PROMPT = "ALIC#ID1->"
POSITIONS = "l1"
METHODS = ("consreft", "loreft", "nodireft", "noreft", "direft", "lobireft")
# Lengths of the paper's own experiment, and the number of parameters of its edit (LLaMA-7B, d = 4096).
PAPER_LENGTHS, PAPER_PARAMETERS, PAPER_WHOLE = (128, 256, 512, 1024, 2048, 2560, 3072, 4096), 4097, 2048
ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what \
is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit \
say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that \
she ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took \
a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it \
flashed across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take \
out of it, and burning with curiosity, she ran across the field after it, and fortunately was just in time to see it \
pop down a large rabbit-hole under the hedge.
"""


@dataclass(frozen=True)
class Cell:
    """One run: which edit learns how many tokens."""

    method: str
    rank: int
    layer: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.method} rank {self.rank} layer {self.layer} tokens {self.length}"


def plan(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, the short ones first."""
    return [
        Cell(method, rank, layer, length)
        for length in sorted(arguments.lengths)
        for method in arguments.methods
        for rank in arguments.ranks
        for layer in arguments.layers
    ]


def learn(base: Any, tokenizer: Any, target: list[int], cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one edit until it recites ``target`` or the epochs are over; what it recites, and what that took."""
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    config = ReftConfig(method=cell.method, layers=[cell.layer], rank=cell.rank, positions=POSITIONS)
    model = get_reft_model(base, config).train()
    (start,) = encode_prompts(tokenizer, [PROMPT])
    item = ItemLayout([POSITIONS]).item(torch.tensor([*start, *target]), len(start))
    batch = for_targets(suffix_batch(SupervisedCollator(0)([item])))
    batch = {name: value.to(base.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    wanted = torch.tensor(target, device=base.device)
    cache = FrozenCache(model, "memory", budget=None)
    optimizer = torch.optim.AdamW(model.interventions.parameters(), lr=arguments.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / arguments.epochs)
    losses = []
    for _ in range(arguments.epochs):
        with cache.apply(batch) as inputs:
            output = model(**inputs)
        losses.append(float(output.loss.detach()))
        if torch.equal(output.logits[0].argmax(-1), wanted):
            break
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    recital = recite(model, tokenizer, PROMPT, target, by="generation" if arguments.generate else "teacher_forcing")
    model.remove_hooks()
    return {
        "method": cell.method,
        "rank": cell.rank,
        "layer": cell.layer,
        "length": cell.length,
        "recited": recital.length,
        "right_tokens": sum(said == one for said, one in zip(recital.said, target, strict=True)),
        "parameters": sum(parameter.numel() for parameter in model.interventions.parameters()),
        "epochs": len(losses),
        "loss": [losses[0], losses[-1]],
        "seconds": round(seconds, 2),
        "frozen_blocks": cache.frozen_blocks,
    }


def cost(cell: Cell, layers: int, vocabulary: int, width: int) -> float:
    """What an epoch of a cell costs, in any unit: the blocks after the edit, about 12 d² a token, and the logits."""
    return cell.length * ((layers - cell.layer - 1) * 12 * width**2 + vocabulary * width)


def run(arguments: argparse.Namespace, base: Any, tokenizer: Any, text: list[int], report: dict[str, Any]) -> None:
    """Runs the cells that ``report`` lacks, and writes it after each."""
    cells = [cell for cell in plan(arguments) if cell.name not in report["cells"]]
    config = base.config
    work = {cell: cost(cell, config.num_hidden_layers, config.vocab_size, config.hidden_size) for cell in cells}
    began, done = time.perf_counter(), 0.0
    for number, cell in enumerate(cells, start=1):
        found = learn(base, tokenizer, text[: cell.length], cell, arguments)
        report["cells"][cell.name] = found
        store.write_json(arguments.out, report)
        # By the epochs that were needed, which makes the estimate of the rest an upper bound.
        done += work[cell] * found["epochs"]
        left = (time.perf_counter() - began) / done * arguments.epochs * sum(work[later] for later in cells[number:])
        print(
            f"[{number}/{len(cells)}] {cell.name}: recites {found['recited']} after {found['epochs']} epochs, "
            f"{found['seconds']:.0f} s; at most {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


def about_run(arguments: argparse.Namespace, text: list[int]) -> dict[str, Any]:
    """What has to be the same for cells of several calls to stand in one file."""
    return {
        "model": arguments.model_name,
        "text": "Alice's Adventures in Wonderland" if arguments.text is None else arguments.text.name,
        "first_tokens": hashlib.sha256(json.dumps(text[:16]).encode()).hexdigest()[:16],
        "prompt": PROMPT,
        "epochs": arguments.epochs,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "by": "generation" if arguments.generate else "teacher forcing",
    }


def read_report(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The report of earlier calls, or a new one. Raises SystemExit where its cells were run otherwise."""
    if not path.exists():
        return {"settings": about, "cells": {}}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = report.get("settings", {})
    other = {name: before.get(name) for name, value in about.items() if before.get(name) != value}
    if other:
        now = {name: about[name] for name in other}
        raise SystemExit(f"--out {path}: its cells were run with {other}, not {now}; name another file or remove it")
    return report


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": machine.device_name(torch.device(arguments.device)),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        },
        "commit": machine.commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def print_table(report: dict[str, Any]) -> None:
    """Recited tokens, a line for each edit and a column for each length."""
    cells = list(report["cells"].values())
    lengths = sorted({cell["length"] for cell in cells})
    print(f"{'recited tokens of':<30}" + "".join(f"{length:>8}" for length in lengths) + f"{'parameters':>12}")
    for method, rank, layer in edits(cells):
        row = {cell["length"]: cell for cell in cells if edit_of(cell) == (method, rank, layer)}
        numbers = "".join(f"{row[length]['recited'] if length in row else '-':>8}" for length in lengths)
        print(f"{f'{method}, rank {rank}, layer {layer}':<30}{numbers}{next(iter(row.values()))['parameters']:>12,}")


def edit_of(cell: dict[str, Any]) -> tuple[str, int, int]:
    return cell["method"], cell["rank"], cell["layer"]


def edits(cells: Sequence[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return sorted({edit_of(cell) for cell in cells})


def plot(report: dict[str, Any], path: Path) -> None:
    """Share recited against length for the smallest edit, most tokens recited against rank, and the paper's shape."""
    import matplotlib
    from matplotlib.figure import Figure

    cells = list(report["cells"].values())
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    layers, ranks = sorted({cell["layer"] for cell in cells}), sorted({cell["rank"] for cell in cells})
    colours = dict(zip(layers, matplotlib.colormaps["viridis"].resampled(len(layers) + 1).colors, strict=False))
    several = len(ranks) > 1 or len(methods) > 1
    figure = Figure(figsize=(4.3 * (2 + several), 3.7), layout="constrained")
    axes = figure.subplots(1, 2 + several)
    rank = min(cell["rank"] for cell in cells if cell["method"] == methods[0])
    smallest = [cell for cell in cells if (cell["method"], cell["rank"]) == (methods[0], rank)]
    for layer in layers:
        points = sorted((c["length"], 100 * c["recited"] / c["length"]) for c in smallest if c["layer"] == layer)
        if not points:
            continue
        how = {"color": colours[layer], "label": f"layer {layer}", **_width(layer, layers)}
        axes[0].plot(*zip(*points, strict=True), "o-", **how)
    parameters = smallest[0]["parameters"]
    lengths = sorted({cell["length"] for cell in cells})
    _share_axis(axes[0], lengths, parameters * PAPER_WHOLE / PAPER_PARAMETERS)
    about, where = report["settings"], report["environment"]
    axes[0].set_title(f"{about['model']}\n{methods[0]}, rank {rank}: {parameters:,} parameters", fontsize=9, loc="left")
    axes[0].legend(frameon=False, fontsize=8)
    if several:
        _by_rank(axes[1], cells, methods, layers, ranks, colours)
    _paper(axes[-1])
    figure.suptitle(
        f"one edit at the last token of {about['prompt']!r}, {about['epochs']} epochs at most, learning rate "
        f"{about['lr']:g}; {where['device']}, commit {where['commit']}",
        fontsize=8,
    )
    store.replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def _width(layer: int, layers: Sequence[int]) -> dict[str, float]:
    """Of a curve and its marks: those drawn first are the widest, so that equal curves are all seen."""
    above = len(layers) - 1 - layers.index(layer)
    return {"linewidth": 1.4 + 1.5 * above, "markersize": 4 + 2.5 * above}


def _share_axis(axis: Any, lengths: Sequence[int], capacity: float) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axis.minorticks_off()
    axis.axvline(capacity, color="#a0aec0", linestyle=":", linewidth=1.2)
    # At the top, where it meets no curve that has fallen.
    axis.annotate(
        "half as many \ntokens as \nparameters ", (capacity, 60), color="#718096", fontsize=7, va="center",
        ha="right",
    )  # fmt: skip
    axis.set(ylim=(-4, 106), xlabel="tokens to recite", ylabel="recited from the start, %")
    axis.spines[["top", "right"]].set_visible(False)


def _by_rank(
    axis: Any, cells: Sequence[dict[str, Any]], methods: Sequence[str], layers: Sequence[int], ranks: Sequence[int],
    colours: dict[int, Any],
) -> None:  # fmt: skip
    for method, style in zip(methods, ("o-", "s--", "^:", "v-.", "D-", "x--"), strict=False):
        for layer in layers:
            own = [c for c in cells if c["method"] == method and c["layer"] == layer]
            points = [
                (r, max(c["recited"] for c in own if c["rank"] == r)) for r in ranks if any(c["rank"] == r for c in own)
            ]
            if not points:
                continue
            label = f"{method}, layer {layer}" if len(methods) > 1 else f"layer {layer}"
            axis.plot(*zip(*points, strict=True), style, color=colours[layer], label=label, **_width(layer, layers))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks], fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set(xlabel="rank", ylabel="most tokens recited")
    axis.set_title(f"longest text tried: {max(cell['length'] for cell in cells):,} tokens", fontsize=9, loc="left")
    axis.legend(frameon=False, fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _paper(axis: Any) -> None:
    """What the paper says of its experiment, as a band: its figures are not in this file."""
    upper, lower = (
        [min(100.0, 100 * (PAPER_WHOLE / length) ** steepness) for length in PAPER_LENGTHS] for steepness in (1.5, 6)
    )
    axis.fill_between(PAPER_LENGTHS, lower, upper, color="#ed8936", alpha=0.25, linewidth=0)
    axis.plot([PAPER_LENGTHS[0], PAPER_WHOLE], [100, 100], color="#dd6b20", linewidth=2)
    _share_axis(axis, PAPER_LENGTHS, PAPER_PARAMETERS / 2)
    axis.set_xticks([128, 512, 2048, 4096], ["128", "512", "2,048", "4,096"])
    axis.set_title(
        f"the paper's shape, a sketch of its text (F.1)\nLLaMA-7B, rank 1: {PAPER_PARAMETERS:,} parameters",
        fontsize=9, loc="left",
    )  # fmt: skip
    axis.annotate("100 % at most layers\nup to 2,048 tokens", (160, 90), fontsize=8, va="top", color="#9c4221")
    axis.annotate("beyond it collapses\n(how far: not drawn\nfrom its data)", (160, 28), fontsize=8, color="#9c4221")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memorisation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, help="a file of plain text; by default the beginning of Alice in Wonderland")
    add("--model", help="a folder of save_pretrained, with its tokenizer; SmolLM2-135M by default")
    add("--tiny", action="store_true", help="a random Llama of two layers, to see that all of it works")
    add("--layers", type=int, nargs="+")
    add("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    add("--ranks", type=int, nargs="+", default=[1])
    add("--methods", nargs="+", choices=METHODS, default=["consreft"])
    add("--epochs", type=int, default=1000)
    add("--lr", type=float, default=4e-3)
    add("--seed", type=int, default=42)
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--generate", action="store_true", help="let the model hear what it says itself, a pass for each token")
    add("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text {arguments.text}: no such file")
    if min([arguments.epochs, *arguments.lengths, *arguments.ranks]) < 1:
        parser.error("--epochs, --lengths and --ranks must be at least 1")
    torch.set_num_threads(arguments.threads)
    base, tokenizer = load(arguments)
    count = base.config.num_hidden_layers
    if arguments.layers is None:
        arguments.layers = [count // 6, count // 2, count - count // 6] if count > 2 else [0]
    if bad := [layer for layer in arguments.layers if not 0 <= layer < count]:
        parser.error(f"--layers {bad[0]}: {arguments.model_name} has layers 0 to {count - 1}")
    text = ALICE if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if max(arguments.lengths) > len(tokens):
        parser.error(
            f"--lengths {max(arguments.lengths)}: the text has {len(tokens)} tokens (another one: --text FILE)"
        )
    report = read_report(arguments.out, about_run(arguments, tokens))
    report["environment"] = environment(arguments)
    report["frozen_recites"] = recite(base, tokenizer, PROMPT, tokens[: max(arguments.lengths)]).length
    run(arguments, base, tokenizer, tokens, report)
    store.write_json(arguments.out, report)
    print_table(report)
    plot(report, arguments.out.with_suffix(".png"))
    print(f"\n{arguments.out}\n{arguments.out.with_suffix('.png')}")
    return 0


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The frozen model and its tokenizer; sets ``arguments.model_name``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if arguments.tiny:
        from benchmarks.tiny import tiny_llama, tiny_tokenizer

        arguments.model_name = "random Llama, 2 layers, width 32"
        model, tokenizer = tiny_llama(), tiny_tokenizer()
    else:
        from benchmarks.smollm2 import smollm2_folder

        named = arguments.model is not None
        arguments.model_name = Path(arguments.model).name if named else "SmolLM2-135M (dequantised Q4_1)"
        source = arguments.model if named else smollm2_folder()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, arguments.dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    return model.eval().requires_grad_(False).to(arguments.device), tokenizer


if __name__ == "__main__":
    raise SystemExit(main())
