"""Rows, losses and gradients for the tests of FrozenCache."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor

from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.positions import get_intervention_locations
from reft_kernels.training import SupervisedCollator

# Its defaults drop out.
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# A window shorter than the rows, so that a token's place within them matters; softcap is on by default.
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gemma2": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
}
LENGTHS = ((9, 3), (5, 2), (12, 6), (1, 2), (4, 1))
"""Prompt and output of some rows; the prompt of one is shorter than any suffix."""


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float64, **config: Any) -> ReftModel:
    """In train mode, base model and interventions of one dtype."""
    base = tiny_model(architecture, **SETTINGS.get(architecture, {})).to(dtype)
    settings = {"method": "loreft", "layers": [1, 2], "rank": 2, "positions": "l2", **config}
    model = get_reft_model(base, ReftConfig(**settings))
    model.interventions.to(dtype)
    return model.train()


def make_rows(
    model: ReftModel, positions: str = "l2", lengths: Any = LENGTHS, seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Items as SupervisedDataset makes them."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    items = []
    for prompt, output in lengths:
        ids = torch.randint(3, VOCABULARY, (prompt + output,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        rows = get_intervention_locations(
            prompt, positions=positions, num_interventions=len(model.representations), share_weights=model.config.tied
        )
        items.append({"input_ids": ids, "labels": labels, "intervention_locations": torch.tensor(rows)})
    return items


def mean_loss(output: Any, labels: Tensor) -> Tensor:
    """Of the labelled tokens, in the logits' own dtype (transformers' loss is in float32)."""
    return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model: ReftModel, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [p.grad.clone() for p in model.interventions.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def uncached(model: ReftModel, items: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the whole rows."""
    batch = SupervisedCollator()(items)
    loss = mean_loss(model(**batch, use_cache=False), batch["labels"])
    return loss.detach(), gradients(model, loss)


def cached(model: ReftModel, cache: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a batch of SuffixCollator."""
    with cache.apply(batch) as inputs:
        loss = mean_loss(model(**inputs), batch["labels"])
    return loss.detach(), gradients(model, loss)


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative to the largest value."""
    off = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return off / max(float(b.abs().max()) for b in wanted)
