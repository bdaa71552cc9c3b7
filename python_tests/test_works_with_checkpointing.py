"""Gradient checkpointing: the recomputed forward is edited as the forward was; gradients are those without it.

Bit for bit, as the same operations are made on the same values, with two exceptions to rounding: the reentrant
checkpoint sends the gradients of one R through it one by one where several forwards of a backward used it, and rows
rebuilt from their edit (``rebuild``) are copied instead where saved tensors go through hooks.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hand_edits import strengthen
from tiny_models import LAYERS, WIDTH, random_batch, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reft_kernels.orthogonal
from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.recompute import FollowingCheckpoint

# Whether checkpointing wraps a layer's forward, so that its hooks run outside, or its whole call.
HOOKS_RUN_OUTSIDE = "__init_subclass__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)
COMPONENTS = ("block_output", "block_input", "mlp_output", "attention_output")
ways = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
    # of blocks before the first edit, whose inputs require none
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


def make(model: Any, **settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": [1, 2], "rank": 2, "positions": "f2+l2", "tied": False}
    defaults["rebuild"] = False
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.train()


def enable(model: Any, reentrant: bool, input_gradients: bool = True) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base = getattr(model, "model", None) if isinstance(model, ReftModel) else model
    if not input_gradients and base.get_input_embeddings()._forward_hooks:  # transformers 5 turns them on
        base.disable_input_require_grads()


def gradients(reft_model: ReftModel, *calls: dict[str, Any]) -> dict[str, Tensor]:
    """Of the sum of the losses of all calls, every forward before the one backward."""
    named = {name: p for name, p in reft_model.named_parameters() if p.requires_grad}
    for p in named.values():
        p.grad = None
    torch.stack([reft_model(**call).loss for call in calls]).sum().backward()
    return {name: p.grad for name, p in named.items() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rounded: bool = False) -> None:
    assert found.keys() == wanted.keys()
    assert any(grad.abs().max() > 0 for grad in wanted.values())
    for name, grad in found.items():
        if rounded:
            torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert grad.equal(wanted[name]), name


def batch_of(lengths: list[int], **more: Any) -> dict[str, Any]:
    batch = random_batch(lengths)
    return {**batch, "labels": batch["input_ids"], "use_cache": False, **more}


def counted(module: nn.Module) -> list[int]:
    """Grows by one whenever the module runs."""
    ran: list[int] = []
    module.register_forward_pre_hook(lambda module, args: ran.append(1))
    return ran


def functions(model: nn.Module) -> list[Any]:
    return [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]


@ways
@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_gradients_are_those_without_checkpointing(
    architecture: str, component: str, trained_base: bool, reentrant: bool
) -> None:
    model = tiny_model(architecture)
    reft_model = make(model, component=component)
    model.requires_grad_(trained_base)
    call = batch_of([6, 4])
    if architecture == "bert":
        call = {**random_batch([6, 4]), "labels": torch.tensor([0, 1])}
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    ran = counted(next(m for name, m in blocks[1].named_modules() if name.endswith(("act_fn", "act", "dense"))))

    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)  # the base model has dropout
        return gradients(reft_model, call)

    wanted = run()
    assert set(wanted) >= {f"interventions.{name}" for name, _ in reft_model.interventions.named_parameters()}
    assert len(ran) == 1
    enable(reft_model, reentrant)
    assert_same(run(), wanted)
    assert len(ran) == 3  # the block was recomputed
    reft_model.gradient_checkpointing_disable()
    assert_same(run(), wanted)
    assert len(ran) == 4


@ways
def test_rebuilt_rows(reentrant: bool) -> None:
    reft_model = make(tiny_model("llama"), rebuild=True)
    call = batch_of([6, 4])
    wanted = gradients(reft_model, call)
    enable(reft_model, reentrant)
    assert_same(gradients(reft_model, call), wanted, rounded=True)


@ways
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_enabled_on_the_base_model(component: str, reentrant: bool) -> None:
    model = tiny_model("llama")
    reft_model = make(model, component=component)
    call = batch_of([6, 4])
    wanted = gradients(reft_model, call)
    enable(model, reentrant)
    assert_same(gradients(reft_model, call), wanted)


@ways
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_every_backward_follows_its_own_forward(component: str, reentrant: bool) -> None:
    """Two edited forwards with other positions and one of the base model, then one backward."""
    model = tiny_model("llama")
    reft_model = make(model, component=component)
    model.lm_head.requires_grad_(True)
    calls = [batch_of([6, 4]), batch_of([5, 7], positions="f1+l3"), batch_of([4], unit_locations=[[[2]]] * 4)]
    wanted = gradients(reft_model, *calls)
    plain = torch.autograd.grad(model(**calls[0]).loss, model.lm_head.weight)[0]
    enable(reft_model, reentrant)
    found = gradients(reft_model, *calls)
    assert_same(found, wanted, rounded=reentrant)
    losses = [reft_model(**calls[0]).loss, model(**calls[0]).loss, reft_model(**calls[1]).loss]
    losses[1].backward(retain_graph=True)
    torch.testing.assert_close(model.lm_head.weight.grad, wanted["model.lm_head.weight"] + plain)
    for p in reft_model.parameters():
        p.grad = None
    (losses[2] + losses[0]).backward()
    assert_same(gradients_of(reft_model), gradients(reft_model, calls[0], calls[1]), rounded=True)


def gradients_of(reft_model: ReftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in reft_model.named_parameters() if p.grad is not None}


@ways
def test_dropout_draws_the_same_masks_again(reentrant: bool) -> None:
    reft_model = make(tiny_model("llama", attention_dropout=0.3), component="mlp_output", dropout=0.4)
    call = batch_of([6, 4])

    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return gradients(reft_model, call, call)

    wanted, other = run(0), run(1)
    assert any(not grad.equal(other[name]) for name, grad in wanted.items())
    enable(reft_model, reentrant)
    assert_same(run(0), wanted, rounded=reentrant)


@ways
def test_interventions_of_ones_own(reentrant: bool) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.randn(WIDTH))

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            return base + self.by.tanh()

    place = {"layer": 1, "component": "mlp_output", "intervention": Shift(), "positions": "l2"}
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(place)).train()
    call = batch_of([6, 4])
    wanted = gradients(reft_model, call)
    enable(reft_model, reentrant)
    assert_same(gradients(reft_model, call), wanted)


@ways
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_R_of_all_layers_is_computed_once(component: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    computed = reft_kernels.orthogonal._computed

    def count(modules: Any) -> Any:
        made.append(len(modules))
        return computed(modules)

    monkeypatch.setattr(reft_kernels.orthogonal, "_computed", count)
    reft_model = make(tiny_model("llama"), component=component)
    enable(reft_model, reentrant)
    gradients(reft_model, batch_of([6, 4]))
    inside = reentrant and (component == "mlp_output" or not HOOKS_RUN_OUTSIDE)
    assert made == [4] + [1] * (4 if inside else 0)  # a reentrant backward sends each gradient to its own X alone


@ways
def test_blocks_before_the_first_edit_are_not_recomputed(reentrant: bool) -> None:
    model = tiny_model("llama")
    reft_model = make(model, component="mlp_output", layers=[1])
    enable(reft_model, reentrant, input_gradients=False)
    ran = [counted(block.mlp) for block in model.model.layers]
    gradients(reft_model, batch_of([6]))
    assert [len(times) for times in ran] == [1, 2, 2]


def test_backward_in_another_thread() -> None:
    reft_model = make(tiny_model("llama"), component="mlp_output")
    call = batch_of([6, 4])
    wanted = gradients(reft_model, call)
    enable(reft_model, reentrant=False)
    for p in reft_model.parameters():
        p.grad = None
    loss = reft_model(**call).loss
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    assert_same(gradients_of(reft_model), wanted)


@ways
def test_two_adapters_of_one_model(reentrant: bool) -> None:
    model = tiny_model("llama")
    one, other = make(model, component="mlp_output"), make(model, component="attention_output", layers=[0])
    call = batch_of([6, 4])
    wanted = gradients(one, call), gradients(other, call)
    enable(one, reentrant)
    losses = one(**call).loss, other(**call).loss
    for p in (*one.parameters(), *other.parameters()):
        p.grad = None
    losses[0].backward()
    losses[1].backward()
    assert_same(gradients_of(one), wanted[0])
    assert_same(gradients_of(other), wanted[1])
    other.remove_hooks()
    assert_same(gradients(one, call), wanted[0])


def disabled(reft_model: ReftModel) -> None:
    reft_model.gradient_checkpointing_disable()


def removed(reft_model: ReftModel) -> None:
    reft_model.remove_hooks()


def disabled_on_the_base(reft_model: ReftModel) -> None:
    reft_model.model.gradient_checkpointing_disable()


@pytest.mark.parametrize("end", [disabled, removed, disabled_on_the_base])
def test_nothing_is_left_behind(end: Callable[[ReftModel], None]) -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    enable(reft_model, reentrant=False, input_gradients=False)
    reft_model(**batch_of([6])).loss.backward()
    assert any(isinstance(function, FollowingCheckpoint) for function in functions(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(function, FollowingCheckpoint) for function in functions(copied))
        assert {type(function) for function in functions(copied)} == {type(None), partial}
    end(reft_model)
    assert not any(isinstance(function, FollowingCheckpoint) for function in functions(model))


def test_nothing_is_left_behind_by_one_that_is_gone() -> None:
    model = tiny_model("llama")
    enable(model, reentrant=False)
    before = functions(model)
    reft_model = make(model)
    reft_model(**batch_of([6])).loss.backward()
    assert functions(model) != before
    del reft_model
    gc.collect()
    assert functions(model) == before


class Checkpointed(nn.Module):
    """Checkpoints its middle by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reentrant = reentrant
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if not self.checkpointing:
            return self.middle(h).tanh()
        y: Any = checkpoint(lambda h: self.middle(h).tanh(), h, use_reentrant=self.reentrant)
        return y


@ways
def test_checkpoints_of_ones_own_are_refused(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    reft_model = get_reft_model(
        model, ReftConfig({"component": "middle.output", "intervention": intervention}), disable_model_grads=False
    )
    x = torch.randn(2, 5, WIDTH)
    loss = reft_model({"x": x})[1].sum()
    with pytest.raises(RuntimeError, match=r"gradient checkpointing recomputes middle, whose output is edited"):
        loss.backward()
    model.checkpointing = False
    reft_model({"x": x})[1].sum().backward()


@ways
def test_the_base_model_by_itself_is_recomputed_without_edits(reentrant: bool) -> None:
    """Also after the same model was trained with edits."""
    model = tiny_model("llama")
    call = batch_of([6, 4])
    wanted = torch.autograd.grad(model(**call).loss, list(model.parameters()))
    reft_model = make(model, component="mlp_output")
    model.requires_grad_(True)
    enable(reft_model, reentrant)
    gradients(reft_model, call)
    for p in model.parameters():
        p.grad = None
    model(**call).loss.backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None
        assert p.grad.equal(grad)


def test_hidden_states_by_keyword_are_refused_where_they_would_get_no_gradients() -> None:
    class Block(transformers.modeling_layers.GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.inner(hidden_states)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(hidden_states=x)

    model = Model()
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    reft_model = get_reft_model(model, ReftConfig({"component": "block.inner.output", "intervention": intervention}))
    reft_model.train()
    model.block.gradient_checkpointing = True
    model.block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    reft_model({"x": torch.randn(1, 3, WIDTH)})[1].sum().backward()
    assert all(p.grad is not None for p in reft_model.interventions.parameters())
    model.block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    with pytest.raises(RuntimeError, match="takes its hidden states by keyword: set use_reentrant=False"):
        reft_model({"x": torch.randn(1, 3, WIDTH)})


@ways
@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output"])
def test_training_arguments(component: str, reentrant: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    items = [{name: value[0] for name, value in random_batch([6]).items()} for _ in range(8)]
    for item in items:
        item["labels"] = item["input_ids"]

    def run(**options: Any) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        reft_model = make(tiny_model("llama"), component=component, dropout=0.1)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=0.05, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=0,
            **options,
        )  # fmt: skip
        trainer = transformers.Trainer(reft_model, arguments, train_dataset=items)
        trainer.train()
        assert reft_model.model.is_gradient_checkpointing == bool(options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {name: p.detach().clone() for name, p in reft_model.interventions.named_parameters()}

    losses, weights = run()
    kwargs = {"use_reentrant": reentrant}
    found_losses, found = run(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert found_losses == losses
    assert_same(found, weights)


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_compiled(component: str) -> None:
    model = tiny_model("llama")
    reft_model = make(model, component=component)
    call = batch_of([6, 4])
    wanted = gradients(reft_model, call)
    enable(reft_model, reentrant=False, input_gradients=False)
    torch._dynamo.reset()
    for p in reft_model.parameters():
        p.grad = None
    compiled: Any = torch.compile(reft_model, backend="aot_eager", fullgraph=True)
    compiled(**call).loss.backward()
    found = gradients_of(reft_model)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-4)
