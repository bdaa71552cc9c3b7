"""A ReftModel on a CUDA device: as on a CPU, without waiting for the device, checkpointed, generating, compiled.

Run by ``make test-gpu`` and by ``benchmarks/gpu_suite.sh``. GPU_TEST_DEVICE=cpu runs the same calls on a CPU, to check
the tests themselves.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graph import recorded_capture
from tiny_models import VOCABULARY, random_batch, tiny_model
from torch import Tensor

from reft_kernels import ReftConfig, get_reft_model

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
METHODS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")


def make(method: str = "loreft", dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """(on the CPU, on the device), with the same weights."""
    settings = {"layers": "all", "rank": 4, "positions": "f2+l2", "tied": False, **settings}
    model = get_reft_model(tiny_model("llama"), ReftConfig(method=method, **settings))
    moved = get_reft_model(copy.deepcopy(model.model).to(DEVICE, dtype), ReftConfig(method=method, **settings))
    moved.interventions.load_state_dict(model.interventions.state_dict())
    return model, moved


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error wherever the host waits for the device."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = model(**batch, labels=batch["input_ids"]).loss
    return loss.detach().cpu(), [
        g.cpu() for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"positions": None, "tied": True}], ids=["untied", "every token"])
def test_loss_and_gradients_are_those_of_a_cpu(method: str, settings: dict[str, Any]) -> None:
    model, moved = make(method, **settings)
    batch = random_batch([9, 6, 8], side="left")
    loss, wanted = gradients(model, batch)
    found_loss, found = gradients(moved, on_device(batch))
    torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-4)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("way", ["positions", "unit_locations", "every token"])
def test_a_forward_and_backward_never_waits(way: str) -> None:
    _, moved = make(positions=None if way == "every token" else "f2+l2", tied=way == "every token")
    # Without a mask: transformers reads one back to see whether it hides anything.
    batch = on_device({"input_ids": random_batch([8, 8])["input_ids"]})
    more: dict[str, Any] = {}
    if way == "unit_locations":
        count = len(moved.interventions)
        more["unit_locations"] = torch.tensor([[[0, 5], [1, 7]]] * count, device=DEVICE)
    for step in range(2):  # the first compiles kernels, which may wait
        with no_waiting() if step else contextlib.nullcontext():
            moved(**batch, **more).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in moved.interventions.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, moved = make(dtype=dtype)
    batch = random_batch([9, 7])
    expected = model(**batch).logits
    found = moved(**on_device(batch)).logits
    assert found.dtype == dtype
    error = (found.float().cpu() - expected).abs().max()
    plain = copy.deepcopy(model).to(dtype)(**batch).logits.float() - expected
    assert error <= 4 * plain.abs().max() + 1e-2
    assert not torch.equal(found, moved.model(**on_device(batch)).logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_checkpointed(component: str, reentrant: bool) -> None:
    _, moved = make(component=component)
    batch = on_device(random_batch([9, 7]))
    moved.train()
    loss, wanted = gradients(moved, batch)
    moved.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # torch.autograd.grad does not go through a reentrant checkpoint.
    parameters = [p for p in moved.parameters() if p.requires_grad]
    found_loss = moved(**batch, labels=batch["input_ids"]).loss
    found_loss.backward()
    torch.testing.assert_close(found_loss.detach().cpu(), loss)
    for parameter, want in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(cache: str) -> None:
    model, moved = make()
    batch = random_batch([7, 4], side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = model.generate(**batch, **options)
    found = moved.generate(**on_device(batch), **options, **more)
    torch.testing.assert_close(torch.stack(found.logits).cpu(), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    plain = model.model.generate(**batch, **options)
    assert not torch.equal(torch.stack(plain.logits), torch.stack(expected.logits))


def test_compiled_whole() -> None:
    _, moved = make()
    batch = on_device(random_batch([9, 7]))
    torch._dynamo.reset()
    compiled: Any = torch.compile(moved, fullgraph=True)
    loss, wanted = gradients(moved, batch)
    found = compiled(**batch, labels=batch["input_ids"]).loss
    grads = torch.autograd.grad(found, [p for p in moved.parameters() if p.requires_grad])
    torch._dynamo.reset()
    torch.testing.assert_close(found.detach().cpu(), loss, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-3, atol=2e-4)


def test_it_learns() -> None:
    _, moved = make(rank=8)
    batch = on_device({"input_ids": torch.randint(3, VOCABULARY, (4, 12))})
    optimizer = torch.optim.AdamW([p for p in moved.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = moved(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
@pytest.mark.parametrize("way", ["float32", "bf16"])
def test_step_graphs_train_as_the_steps_do(
    orthogonality: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `train` runs it: two padded lengths, positions, target columns, accumulation, evaluations in between."""
    from transformers import TrainingArguments

    from reft_kernels.training import ReftTrainerForCausalLM
    from reft_kernels.training.data import SupervisedCollator
    from reft_kernels.training.item_layout import ItemLayout

    if DEVICE != "cuda":
        monkeypatch.setattr("reft_kernels.training.trainer.cuda_capture", recorded_capture)
    layout = ItemLayout(["f2+l2"] * 3)
    torch.manual_seed(0)
    rows = [layout.item(torch.randint(3, VOCABULARY, (7 + 3 * (k % 6),)), 4) for k in range(96)]
    curves = []
    for step_graphs in (False, True):
        torch.manual_seed(1)
        _, model = make(orthogonality=orthogonality, tied=True)
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, gradient_accumulation_steps=3,
            learning_rate=1e-2, logging_steps=1, eval_strategy="epoch", bf16=way == "bf16", report_to="none",
            use_cpu=DEVICE == "cpu", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = ReftTrainerForCausalLM(
            model, arguments, SupervisedCollator(0, 16), train_dataset=rows, eval_dataset=rows[:8],
            step_graphs=step_graphs,
        )  # fmt: skip
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.step_graphs is not None
    assert trainer.step_graphs.stats.replayed > trainer.step_graphs.stats.steps / 2
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3 if way == "float32" else 3e-2, atol=0)


@pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA's generator")
def test_a_replay_draws_as_the_step_does() -> None:
    """A training that is resumed has its captures elsewhere and the same masks."""
    from reft_kernels.training.step_graphs import StepGraphs, cuda_capture

    found = []
    for before in (2, 7):
        torch.manual_seed(1)
        w = torch.nn.Linear(64, 1, bias=False, device=DEVICE)
        torch.nn.init.ones_(w.weight)

        def step(x: Tensor, w: Any = w) -> Tensor:
            loss: Tensor = w(torch.nn.functional.dropout(x, 0.5)).sum()
            loss.backward()
            return loss.detach()

        graphs = StepGraphs(step, w, lambda: cuda_capture(torch.device(DEVICE, 0)), before=before)
        found.append([float(graphs({"x": torch.ones(64, device=DEVICE)})) for _ in range(12)])
    assert found[0] == found[1]
