"""torch.compile of a whole ReftModel: no graph break, at most two graphs for ten lengths, gradients as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hand_edits import strengthen
from tiny_models import random_batch, tiny_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from reft_kernels import plan
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

LENGTHS = range(5, 15)
LAYERS = 2


class Graphs:
    """A backend that counts what it is given to compile; it runs forward and backward graphs as they are."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._note(self.forward), bw_compiler=self._note(self.backward))(graph, inputs)

    def _note(self, into: list[torch.fx.GraphModule]) -> Any:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            into.append(graph)
            return make_boxed_func(graph)

        return compiler


def make(architecture: str = "llama", **settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", "tied": False}
    reft_model = get_reft_model(
        tiny_model(architecture, num_hidden_layers=LAYERS), ReftConfig(**{**defaults, **settings})
    )
    strengthen(reft_model.interventions)
    return reft_model.eval()


def call_of(length: int, way: str) -> dict[str, Any]:
    """Inputs of two rows, one of them padded, and where to edit them; the number of positions stays."""
    batch: dict[str, Any] = random_batch([length, length - 2])
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(length) < length // 2, -100)
    table = torch.randint(-1, length - 2, (2 * LAYERS, 2, 3))
    if way == "positions of the call":
        return {**batch, "positions": "f1+l3"}
    if way == "unit_locations":
        return {**batch, "unit_locations": {"sources->base": (None, table)}}
    if way == "intervention_locations":
        return {**batch, "intervention_locations": table.transpose(0, 1)}
    return batch


def gradients(model: Any, reft_model: ReftModel, call: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    loss = model(**call).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in reft_model.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("positions", {}),
        ("positions", {"tied": True, "component": "mlp_output"}),
        ("positions of the call", {}),
        ("every token", {"positions": None, "tied": True}),
        ("unit_locations", {}),
        ("intervention_locations", {}),
        ("intervention_locations", {"component": "block_input", "method": "nodireft"}),
    ],
    ids=str,
)
def test_two_graphs_for_ten_lengths(way: str, settings: dict[str, Any]) -> None:
    reft_model = make(**settings)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled: Any = torch.compile(reft_model, backend=graphs, fullgraph=True)
    for length in LENGTHS:
        call = call_of(length, way)
        loss, wanted = gradients(reft_model, reft_model, call)
        found_loss, found = gradients(compiled, reft_model, call)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-5)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert 1 <= len(graphs.forward) <= 2
    assert len(graphs.backward) == len(graphs.forward)


@pytest.mark.parametrize("architecture", ["bert", "gemma2"])
def test_two_graphs_of_other_architectures(architecture: str) -> None:
    reft_model = make(architecture)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled: Any = torch.compile(reft_model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            batch = random_batch([length, length - 2])
            torch.testing.assert_close(compiled(**batch).logits, reft_model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert 1 <= len(graphs.forward) <= 2


def test_batches_of_other_sizes() -> None:
    """One row is a graph of its own: Dynamo takes sizes of 0 and 1 for constants."""
    reft_model = make()
    torch._dynamo.reset()
    graphs = Graphs()
    compiled: Any = torch.compile(reft_model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for rows in (2, 3, 5, 4, 7):
            batch = random_batch([8] * rows)
            torch.testing.assert_close(compiled(**batch).logits, reft_model(**batch).logits, rtol=1e-4, atol=1e-4)
        assert len(graphs.forward) <= 2
        single = random_batch([8])
        torch.testing.assert_close(compiled(**single).logits, reft_model(**single).logits, rtol=1e-4, atol=1e-4)
    assert len(graphs.forward) <= 3


def test_training_a_compiled_model_is_training_it() -> None:
    """Weights that the optimiser writes are inputs of the graph, R computed anew within it."""
    losses: list[list[float]] = []
    for compiled in (False, True):
        torch.manual_seed(0)
        reft_model = make().train()
        torch._dynamo.reset()
        graphs = Graphs()
        model: Any = torch.compile(reft_model, backend=graphs, fullgraph=True) if compiled else reft_model
        optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.02)
        losses.append([])
        for length in LENGTHS:
            torch.manual_seed(length)
            loss = model(**call_of(length, "positions")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
        assert len(graphs.forward) <= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == len(losses[0])


def test_a_compiled_model_may_be_the_first_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    reft_model = make()
    calls = [call_of(length, "positions of the config") for length in (8, 8, 11)]
    wanted = [reft_model(**call).logits for call in calls]
    monkeypatch.setattr(plan, "_active", plan._Active())
    torch._dynamo.reset()
    compiled: Any = torch.compile(reft_model, backend=Graphs())
    for call, logits in zip(calls, wanted, strict=True):
        torch.testing.assert_close(compiled(**call).logits, logits)
