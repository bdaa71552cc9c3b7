"""Autocast in bf16 and fp16 over fp32 weights: the loss is fp32's to the precision, R and the weights stay fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_edits import strengthen
from tiny_models import random_batch, tiny_model
from torch import Tensor

import reft_kernels.hooks
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make(**settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", "tied": False}
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.train()


def gradients(reft_model: ReftModel, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    parameters = list(reft_model.interventions.parameters())
    loss = reft_model(**batch, use_cache=False).loss
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


@dtypes
@pytest.mark.parametrize(
    "settings", [{}, {"method": "nodireft"}, {"component": "mlp_output", "act_fn": "gelu"}], ids=str
)
def test_the_loss_is_that_of_fp32(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reft_model = make(**settings)
    batch = random_batch([7, 5])
    batch["labels"] = batch["input_ids"]
    loss, wanted = gradients(reft_model, batch)
    seen: list[Any] = []
    edit_rows = reft_kernels.hooks.edit_rows

    def noted(interventions: Any, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.extend((h.dtype, module.edit_weights().R.dtype) for module in interventions)
        return edit_rows(interventions, h, *args, **kwargs)

    monkeypatch.setattr(reft_kernels.hooks, "edit_rows", noted)
    with torch.autocast("cpu", dtype=dtype):
        found_loss, found = gradients(reft_model, batch)
    assert {R for _, R in seen} == {torch.float32}
    if settings.get("component") == "mlp_output":  # what a linear layer returns
        assert {h for h, _ in seen} == {dtype}
    precision = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(found_loss.float(), loss, rtol=precision, atol=precision)
    assert not found_loss.equal(loss)
    assert all(grad.dtype == torch.float32 for grad in found)
    one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, wanted))
    assert float((one - other).norm() / other.norm()) < (0.1 if dtype == torch.bfloat16 else 0.02)


@dtypes
def test_training_under_autocast(dtype: torch.dtype) -> None:
    reft_model = make()
    batch = random_batch([7, 5])
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.02)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=dtype):
            loss = reft_model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for module in reft_model.interventions.values():
        R = module.edit_weights().R
        assert R.dtype == torch.float32
        torch.testing.assert_close(R @ R.T, torch.eye(2), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@dtypes
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_autocast(dtype: torch.dtype, reentrant: bool) -> None:
    reft_model = make(component="mlp_output", rebuild=False)
    batch = random_batch([7, 5])
    batch["labels"] = batch["input_ids"]

    def run() -> list[Tensor]:
        parameters = list(reft_model.interventions.parameters())
        for p in parameters:
            p.grad = None
        with torch.autocast("cpu", dtype=dtype):
            loss = reft_model(**batch, use_cache=False).loss
        loss.backward()
        return [p.grad for p in parameters if p.grad is not None]

    wanted = run()
    reft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = run()
    assert len(found) == len(wanted)
    assert all(one.equal(other) for one, other in zip(found, wanted, strict=True))


@dtypes
def test_generation_under_autocast(dtype: torch.dtype) -> None:
    reft_model = make().eval()
    batch = random_batch([6, 4], side="left")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted = reft_model.generate(**batch, **options).logits[0]
    with torch.autocast("cpu", dtype=dtype):
        found = reft_model.generate(**batch, **options).logits[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
