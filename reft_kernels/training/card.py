"""The adapter card: a README.md in the adapter's folder, which model hubs show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import reft_kernels
from reft_kernels.folders import replace_files
from reft_kernels.model import ReftModel
from reft_kernels.modules import inner_model
from reft_kernels.training.markdown import cell, plain
from reft_kernels.training.report_page import flat

CARD_FILE = "README.md"
MARK = "<!-- written by reft_kernels: it is written anew as long as this line is there -->"


def write_card(
    folder: str | Path,
    reft_model: ReftModel,
    *,
    base_model: str,
    title: str | None = None,
    recipe: str | None = None,
    data: Mapping[str, Any] | str | None = None,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> Path | None:
    """Writes the card of an adapter into its folder: what it is, how to load it, how it was made, what it reached.

    The front matter has `library_name`, `tags` and, where they are names on the hub, `base_model` and `datasets`.

    Args:
        folder: the adapter's.
        reft_model: the model with the adapter, for its class, layers, rank, positions and number of parameters.
        base_model: name on the hub or folder of the base model.
        title: the folder's name by default.
        recipe: name of the recipe that it was trained with.
        data: what it was trained on: a name or a file, or a mapping such as `{"train": ..., "examples": 1000}`.
        settings, metrics: names and values.
        versions: of the packages; by default of this library, torch and transformers.
        tags: more tags for the front matter.

    Returns the card's path, or None where the folder has a README.md that is somebody's own: it stays as it is.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not is_own_card(path):
        return None
    base = inner_model(reft_model.model)
    # Where a folder lies on this computer is nobody's business.
    base_model = base_model if _is_on_hub(base_model) else Path(base_model).name
    trained = sum(parameter.numel() for parameter in reft_model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in reft_model.model.parameters())
    kinds = sorted({type(module).__name__.removesuffix("Intervention") for module in reft_model.interventions.values()})
    described = {
        "base model": base_model,
        "base class": type(base).__name__,
        **({"recipe": recipe} if recipe else {}),
        **_adapter(reft_model, kinds),
        "trained parameters": f"{trained:,} of {total:,} ({100 * trained / max(total, 1):.3g} %)",
    }
    sections = [
        ("Adapter", described),
        ("Metrics", metrics),
        ("Data", {"train": data} if isinstance(data, str) else data),
        ("Settings", settings),
        ("Versions", versions if versions is not None else _versions()),
    ]
    text = "\n".join(
        [
            _front_matter(base_model, data, base, kinds, tags),
            MARK,
            "",
            f"# {plain(title or Path(folder).resolve().name)}",
            "",
            f"An adapter of representation finetuning (ReFT) for {plain(base_model)}: the base model stays frozen, "
            "and hidden states are edited at some layers and positions.",
            "",
            "## Use",
            "",
            _usage(base, base_model),
            *(f"\n## {name}\n\n{_table(values)}" for name, values in sections if values),
            "",
        ]
    )

    replace_files(folder, lambda fresh: _write(fresh / CARD_FILE, text))
    return path


def is_own_card(path: Path) -> bool:
    """Whether there is a card here that this library wrote."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _adapter(reft_model: ReftModel, kinds: Sequence[str]) -> dict[str, Any]:
    items = reft_model.representations
    layers = sorted({item.layer for item in items if item.layer is not None})
    return {
        "interventions": f"{len(items)} ({', '.join(kinds) or 'none'})",
        **({"layers": ranges(layers)} if layers else {}),
        "component": ", ".join(sorted({item.component for item in items})),
        "rank": ", ".join(sorted({str(item.low_rank_dimension) for item in items})),
        "positions": ", ".join(sorted({item.positions or "all" for item in items})),
    }


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: [0, 1, 2, 5] is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "reft_kernels": reft_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _front_matter(
    base_model: str, data: Mapping[str, Any] | str | None, base: Any, kinds: Sequence[str], tags: Sequence[str]
) -> str:
    named = [data] if isinstance(data, str) else list((data or {}).values())
    names = [value.partition(":")[0] for value in named if isinstance(value, str)]
    datasets = [name for name in names if _is_on_hub(name)]
    lines = ["---", "library_name: reft_kernels"]
    if _is_on_hub(base_model):
        lines.append(f"base_model: {_yaml(base_model)}")
    if datasets:
        lines += ["datasets:", *(f"- {_yaml(name)}" for name in dict.fromkeys(datasets))]
    if callable(getattr(base, "can_generate", None)) and base.can_generate():
        lines.append("pipeline_tag: text-generation")
    all_tags = dict.fromkeys(["reft", *(kind.lower() for kind in kinds), "reft_kernels", *tags])
    return "\n".join([*lines, "tags:", *(f"- {_yaml(tag)}" for tag in all_tags), "---"])


def _is_on_hub(name: str) -> bool:
    """Whether this is, by its form, a name on the hub and no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()


def _usage(base: Any, base_model: str) -> str:
    kind = type(base)
    inside = kind.__module__.partition(".")[0] == "transformers"
    name = repr(base_model).replace("`", "\\x60")  # a name may hold anything, a fence of code too
    code = ["from reft_kernels import ReftModel", 'model = ReftModel.load("path/to/this/folder", base)']
    if inside:
        code.insert(0, f"from transformers import {kind.__name__}")
        code[2:2] = ["", f"base = {kind.__name__}.from_pretrained({name})"]
    else:
        code[1:1] = ["", f"base = ...  # the {kind.__name__}"]
    return "\n".join(["```python", *code, "```"])


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {cell(name)} | {cell(text)} |" for name, text in flat(values)]
    return "\n".join(["| | |", "|---|---|", *rows])


def _yaml(text: str) -> str:
    """A double-quoted YAML scalar."""
    escaped = ({'"': '\\"', "\\": "\\\\"}.get(ch) or (ch if ch.isprintable() else f"\\U{ord(ch):08x}") for ch in text)
    return f'"{"".join(escaped)}"'
