"""Folders as AdapterHub's ``adapters`` 1.3.0 saves its ReFT adapters, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pyreft_states import rotation
from safetensors.torch import save_file
from tiny_models import WIDTH
from torch import Tensor


def unit_state(r: int, orthogonality: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {"learned_source.weight": torch.randn(r, WIDTH).to(dtype), "learned_source.bias": torch.randn(r).to(dtype)}
    if not orthogonality:
        return {**state, "projection.weight": torch.randn(r, WIDTH).to(dtype)}
    part = rotation(WIDTH, r).parametrizations.weight  # theirs is the transpose
    original = part.original.detach().T.contiguous()
    return {
        **state,
        "projection.parametrizations.weight.original": original,
        "projection.parametrizations.weight.0.base": part[0].base.contiguous(),
    }


def unit_matrix(state: dict[str, Tensor]) -> Tensor:
    """P [r, d] as torch computes it."""
    if "projection.weight" in state:
        return state["projection.weight"]
    layer = rotation(WIDTH, len(state["learned_source.bias"]))
    original, base = (state[f"projection.parametrizations.weight.{name}"] for name in ("original", "0.base"))
    layer.load_state_dict({"parametrizations.weight.original": original.T, "parametrizations.weight.0.base": base})
    return layer.weight.detach().T


def write_folder(
    folder: Path,
    *,
    layers: Any = "all",
    blocks: str = "model.layers",
    tied: bool = False,
    r: int = 2,
    prefix: int = 2,
    suffix: int = 1,
    orthogonality: bool = True,
    dtype: torch.dtype = torch.float32,
    safetensors: bool = False,
    **others: Any,
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """A saved adapter, and the state of each (layer, unit) in it."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [0, 1, 2] if layers == "all" else layers
    units = {
        (layer, unit): unit_state(r, orthogonality, dtype) for layer in numbers for unit in range(1 if tied else 2)
    }
    tensors = {
        f"{blocks}.{layer}.reft_layer.refts.mine.units.{unit}.{name}": value
        for (layer, unit), state in units.items()
        for name, value in state.items()
    }
    if safetensors:
        save_file(tensors, folder / "adapter.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    config = {
        "architecture": "reft",
        "dropout": 0.05,
        "dtype": None if dtype is torch.float32 else str(dtype).removeprefix("torch."),
        "init_weights_seed": None,
        "layers": layers,
        "non_linearity": None,
        "orthogonality": orthogonality,
        "output_reft": True,
        "prefix_positions": prefix,
        "r": r,
        "suffix_positions": suffix,
        "tied_weights": tied,
        **others,
    }
    document = {
        "config": config,
        "hidden_size": WIDTH,
        "model_class": "LlamaForCausalLM",
        "model_name": "",
        "model_type": "llama",
        "name": "mine",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2, sort_keys=True))
    return units
