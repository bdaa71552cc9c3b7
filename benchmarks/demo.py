"""SmolLM2-135M learns the Zen of Python by heart: memorisation as in the ReFT paper's appendix F.1.

A LoReFT adapter is trained on one example, a two-line Python session as the prompt and the text of the standard
library's module `this` as the answer, until the frozen model recites it. Then one training step is timed three ways
in turn: with the edit as this package computes it, as pyreft computes it, and without any edit. Last, the saved
adapter is loaded into a fresh model, which recites again.

    python -m benchmarks.demo --out demo_output
"""

from __future__ import annotations

import argparse
import ast
import codecs
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.pyreft_peer import Peer, gather, write_back
from benchmarks.smollm2 import smollm2_folder

PROMPT = "$ python3\n>>> import this\n"
LAYERS = list(range(8, 20))
RANK = 4
POSITIONS = "l4"
LEARNING_RATE = 8e-3
WARMUP_STEPS = 5
MAX_STEPS = 250

FROZEN, OURS, PEER = "frozen model", "reft_kernels", "as pyreft does it"


class Lesson(NamedTuple):
    """One example. input_ids [1, S] = prompt + answer; labels [1, S] = -100 on the prompt; target = the answer [N]."""

    prompt: Tensor
    input_ids: Tensor
    labels: Tensor
    target: Tensor

    @property
    def start(self) -> int:
        """Number of tokens of the prompt."""
        return self.prompt.shape[1]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model's training forward."""
        mask = torch.ones_like(self.input_ids)
        return {"input_ids": self.input_ids, "attention_mask": mask, "labels": self.labels}


class TrainingStep(NamedTuple):
    """What one step showed: mean cross-entropy in nats per token, and the length of the right prefix in tokens."""

    loss: float
    recited: int
    seconds: float


def zen_of_python() -> str:
    """The text of the module `this`, which is stored there in ROT13; read from its source, so nothing is printed."""
    spec = importlib.util.find_spec("this")
    if spec is None or spec.origin is None:
        raise RuntimeError("this Python has no source of its module `this`")
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "s":
            return codecs.decode(ast.literal_eval(node.value), "rot13")
    raise RuntimeError(f"{spec.origin} has no string named s")


def make_lesson(tokenizer: Any, prompt: str, answer: str) -> Lesson:
    """Prompt and answer tokenised apart (so the prompt's tokens are those of generation), the answer ended by EOS."""
    head = tokenizer(prompt)["input_ids"]
    target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    labels = [-100] * len(head) + target
    return Lesson(torch.tensor([head]), torch.tensor([head + target]), torch.tensor([labels]), torch.tensor(target))


def right_prefix(tokens: Tensor, target: Tensor) -> int:
    """How many of the first tokens are the target's, before the first that is not."""
    length = min(len(tokens), len(target))
    return int((tokens[:length] == target[:length]).long().cumprod(0).sum())


def train(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    lesson: Lesson,
    *,
    learning_rate: float = LEARNING_RATE,
    max_steps: int = MAX_STEPS,
    on_step: Callable[[int, TrainingStep], None] = lambda i, step: None,
) -> list[TrainingStep]:
    """AdamW on one example until every token of the answer is the model's first choice, or max_steps are over.

    While all tokens before it are right, the argmax at a position is what greedy generation says there; so the
    right prefix of the argmaxes is what the model recites, without generating.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / WARMUP_STEPS, 1 - i / max_steps))
    inputs, history, start = lesson.inputs(), [], time.perf_counter()
    for i in range(max_steps):
        output = model(**inputs, use_cache=False)
        said = output.logits[0, lesson.start - 1 : -1].argmax(-1)
        step = TrainingStep(output.loss.item(), right_prefix(said, lesson.target), time.perf_counter() - start)
        history.append(step)
        on_step(i, step)
        if step.recited == len(lesson.target):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
    return history


def recite(model: Any, lesson: Lesson, tokens: int | None = None) -> Tensor:
    """What the model says after the prompt by greedy generation: at most `tokens` tokens, [T]."""
    sequences = model.generate(
        input_ids=lesson.prompt,
        attention_mask=torch.ones_like(lesson.prompt),
        max_new_tokens=tokens or len(lesson.target),
        do_sample=False,
    )
    said: Tensor = sequences[0, lesson.start :]
    return said


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each callable, a, b, c, a, b, c, ..., after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def time_steps(base: Any, reft_model: Any, lesson: Lesson, rounds: int) -> dict[str, list[float]]:
    """Forward, backward and optimiser step on the lesson, in milliseconds, three ways on one model.

    The frozen model's own step backpropagates to the same depth: to the output of the first edited layer.
    """
    inputs = lesson.inputs()
    peer = Peer(base, LAYERS, RANK)
    first, last = lesson.start - int(POSITIONS[1:]), lesson.start

    def trained(model: Any, adapter: Any) -> Callable[[], None]:
        parameters = [p for p in adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

        def step() -> None:
            peer.positions = [list(range(first, last))] if adapter is peer else None
            model(**inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            peer.positions = None

        return step

    def frozen() -> None:
        handle = base.model.layers[LAYERS[0]].register_forward_hook(
            lambda module, args, output: output.detach().requires_grad_()
        )
        try:
            base(**inputs, use_cache=False).loss.backward()
        finally:
            handle.remove()

    try:
        return interleaved(
            {
                FROZEN: frozen,
                OURS: trained(reft_model, reft_model),
                PEER: trained(base, peer),
            },
            rounds,
        )
    finally:
        peer.remove()


def time_edits(reft_model: Any, width: int, lesson: Lesson, rounds: int) -> dict[str, list[float]]:
    """The edits of all layers alone, forward and backward, in milliseconds, on random rows of the lesson's length."""
    from reft_kernels.interventions import edit_rows

    first, last = lesson.start - int(POSITIONS[1:]), lesson.start
    listed = [list(range(first, last))]
    positions = torch.tensor(listed)
    hidden = torch.randn(1, lesson.input_ids.shape[1], width, requires_grad=True)
    ours = list(reft_model.interventions.values())
    frame = argparse.Namespace()
    frame.config = argparse.Namespace(hidden_size=width)
    frame.model = argparse.Namespace(layers=[torch.nn.Identity() for _ in range(max(LAYERS) + 1)])
    theirs = list(Peer(frame, LAYERS, RANK).edits)

    def reft_kernels() -> None:
        with torch.no_grad():  # as an optimiser's step would: R is computed anew in every round
            for module in ours:
                module.rotate_layer.rows.X.add_(0)
        h = hidden * 1
        for module in ours:
            h = edit_rows([module], h, positions, None)
        torch.autograd.backward(h.sum())
        for parameter in [hidden, *(p for module in ours for p in module.parameters())]:
            parameter.grad = None

    def pyreft() -> None:
        h = hidden * 1
        for module in theirs:
            write_back(h, module(gather(h, listed)), listed)
        torch.autograd.backward(h.sum())
        for parameter in [hidden, *(p for module in theirs for p in module.parameters())]:
            parameter.grad = None

    return interleaved({OURS: reft_kernels, PEER: pyreft}, rounds)


def over(times: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of what `name` took more than the frozen model in the same round, in milliseconds."""
    return statistics.median(t - own for t, own in zip(times[name], times[FROZEN], strict=True))


def plot(
    history: Sequence[TrainingStep],
    total: int,
    steps: dict[str, list[float]],
    edits: dict[str, list[float]],
    path: Path,
) -> None:
    """Left: loss and tokens recited by step. Right: milliseconds per training step, and of the edits alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, grey, colours = "#333333", "#cbd5e0", {OURS: "#2b6cb0", PEER: "#dd6b20"}
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.edgecolor": ink, "text.color": ink})
    figure, axes = plt.subplot_mosaic(
        [["loss", "step"], ["loss", "edits"]],
        figsize=(11.5, 4.4),
        width_ratios=[3, 2],
        height_ratios=[3, 2],
        layout="constrained",
    )

    left, right = axes["loss"], axes["loss"].twinx()
    left.plot([step.loss for step in history], color=colours[OURS], linewidth=1.8)
    left.set(xlabel="training step", title="SmolLM2-135M learns the Zen of Python")
    left.set_ylabel("loss (nats per token)", color=colours[OURS])
    left.set_ylim(bottom=0)
    right.plot([step.recited for step in history], "o", color=colours[PEER], markersize=3.5)
    right.axhline(total, color=colours[PEER], linewidth=0.8, linestyle=":")
    right.set_ylim(0, total * 1.06)
    right.set_ylabel(f"tokens recited (of {total})", color=colours[PEER])

    own = statistics.median(steps[FROZEN])
    for name in (FROZEN, OURS, PEER):
        axes["step"].barh(name, own, color=grey, height=0.6)
        label = f"{own:,.0f}"
        if name != FROZEN:
            added = over(steps, name)
            axes["step"].barh(name, max(added, 0), left=own, color=colours[name], height=0.6)
            label = f"{own + added:,.0f} ({added:+,.0f})"
        axes["step"].annotate(
            label, (max(own, own + over(steps, name)), name), (4, 0), textcoords="offset points", va="center"
        )
    axes["step"].set(title="One training step, ms", xlim=(0, 1.35 * (own + max(over(steps, PEER), 0))))
    alone = {name: statistics.median(edits[name]) for name in (OURS, PEER)}
    bars = axes["edits"].barh(list(alone), list(alone.values()), color=[colours[name] for name in alone], height=0.6)
    axes["edits"].bar_label(bars, [f"{value:,.1f}" for value in alone.values()], padding=4)
    axes["edits"].set(title=f"The edits of {len(LAYERS)} layers alone, ms", xlim=(0, 1.35 * max(alone.values())))
    for name in ("step", "edits"):
        axes[name].invert_yaxis()
        axes[name].spines["right"].set_visible(False)
        axes[name].tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if the text was recited in full, before and after reloading."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for adapter, plot and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each timed step")
    options = parser.parse_args(arguments)

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)
    begin = time.perf_counter()
    warnings.filterwarnings("ignore")

    def section(title: str) -> None:
        console.print()
        console.rule(f"[bold]{title}", align="left", characters="─", style="dim")

    folder = smollm2_folder()

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from reft_kernels import ReftConfig, ReftModel, get_reft_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_base()
    lesson = make_lesson(tokenizer, PROMPT, zen_of_python())
    total = len(lesson.target)
    width = base.config.hidden_size

    def words(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    section("Before: the frozen model")
    before = recite(base, lesson, 60)
    console.print(PROMPT, style="bold", end="", markup=False)
    console.print(words(before).rstrip(), style="dim", markup=False)

    reft_model = get_reft_model(base, ReftConfig(method="loreft", layers=LAYERS, rank=RANK, positions=POSITIONS))
    parameters = [p for p in reft_model.parameters() if p.requires_grad]
    trained, frozen = sum(p.numel() for p in parameters), sum(p.numel() for p in base.parameters())

    section("Training")
    console.print(
        f"LoReFT of rank {RANK} on layers {LAYERS[0]}-{LAYERS[-1]}, on the last {POSITIONS[1:]} of the prompt's "
        f"{lesson.start} tokens:\n{trained:,} parameters beside {frozen:,} frozen ones "
        f"({100 * trained / frozen:.3f} %). The text has {total} tokens.\n"
    )
    console.print("  step    loss   tokens recited", style="bold")

    def show(i: int, step: TrainingStep) -> None:
        if i % 10 == 0 or step.recited == total:
            bar = "━" * round(30 * step.recited / total)
            console.print(f"  {i:4d}  {step.loss:6.3f}   {step.recited:3d} of {total}  [cyan]{bar}[/cyan]")

    reft_model.train()
    history = train(reft_model, parameters, lesson, max_steps=options.max_steps, on_step=show)
    reft_model.eval()
    seconds = history[-1].seconds

    section("After: the same frozen model with its adapter")
    after = recite(reft_model, lesson)
    recited = right_prefix(after, lesson.target)
    console.print(PROMPT, style="bold", end="", markup=False)
    console.print(words(after).rstrip(), style="green" if recited == total else None, markup=False)

    section("Saved, and loaded into a fresh model")
    adapter = options.out / "adapter"
    reft_model.save(adapter)
    size = sum(file.stat().st_size for file in adapter.iterdir())
    fresh = ReftModel.load(adapter, load_base()).eval()
    again = recite(fresh, lesson)
    same = torch.equal(after, again)
    console.print(
        f"{adapter}: {size / 1024:,.0f} KiB; the fresh model says {'the same' if same else 'something else'}."
    )
    del fresh

    section("What the edit costs")
    threads = torch.get_num_threads()
    console.print(
        f"Forward, backward and optimiser; {options.rounds} steps of each kind in turn, medians; threads: {threads}\n"
    )
    steps = time_steps(base, reft_model, lesson, options.rounds)
    edits = time_edits(reft_model, width, lesson, 5 * options.rounds)
    own = statistics.median(steps[FROZEN])
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for title in ("ms", "one step", "more than frozen", f"{len(LAYERS)} edits alone"):
        table.add_column(title, justify="left" if title == "ms" else "right", no_wrap=True)
    table.add_row(FROZEN, f"{own:,.0f}", "", "")
    for name in (OURS, PEER):
        added = over(steps, name)
        table.add_row(
            name,
            f"{own + added:,.0f}",
            f"{added:+,.0f} ({100 * added / own:+.1f} %)",
            f"{statistics.median(edits[name]):.1f}",
        )
    console.print(table)

    picture = options.out / "memorisation.png"
    plot(history, total, steps, edits, picture)

    section("Summary")
    summary = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    for left, right in (
        ("tokens recited before", f"{right_prefix(before, lesson.target)} of {total}"),
        ("tokens recited after", f"[bold]{recited} of {total}[/bold]"),
        ("after reloading", f"{right_prefix(again, lesson.target)} of {total}"),
        ("loss", f"{history[0].loss:.2f} → {history[-1].loss:.3f} in {len(history) - 1} steps, {seconds:.0f} s"),
        ("parameters trained", f"{trained:,} of {trained + frozen:,}"),
        ("adapter on disk", f"{size / 1024:,.0f} KiB"),
        ("plot", str(picture)),
        ("whole demo", f"{time.perf_counter() - begin:.0f} s"),
    ):
        summary.add_row(left, right)
    console.print(summary)

    results = {
        "prompt": PROMPT, "layers": LAYERS, "rank": RANK, "positions": POSITIONS, "learning_rate": LEARNING_RATE,
        "seed": options.seed, "torch": torch.__version__, "threads": threads,
        "tokens": total, "recited": recited, "recited_after_reload": right_prefix(again, lesson.target),
        "trained_parameters": trained, "frozen_parameters": frozen, "adapter_bytes": size,
        "train_seconds": seconds, "loss": [step.loss for step in history],
        "prefix": [step.recited for step in history], "step_ms": steps, "edits_alone_ms": edits,
    }  # fmt: skip
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if recited == total and same else 1


if __name__ == "__main__":
    sys.exit(main())
