"""Faults of pyreft and pyvene at models and interventions: each is seen on the stock packages and not here.

Those of files, data sets and trainers are in test_pyreft_file_faults.py, test_pyreft_datasets.py and
test_pyreft_trainer_faults.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pyreft
import pytest
import pyvene
import torch
from peer import ours_like, settings, stock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import reft_kernels

LAYERS, WIDTH, RANK = (0, 2), 32, 8
WHERE = {"sources->base": (None, [[[0, 4], [1, 2]], [[3, 5], [2, 6]]])}


def llama(**changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


def entries(modules: list[nn.Module], **others: Any) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": module, **others}
        for layer, module in zip(LAYERS, modules, strict=True)
    ]


def two(name: str = "LoreftIntervention", *, entry: dict[str, Any] | None = None, **others: Any) -> tuple[Any, Any]:
    """(stock, ours), with the same weights."""
    theirs = [stock(name, WIDTH, RANK, **others) for _ in LAYERS]
    ours = [ours_like(module, **others) for module in theirs]
    made = []
    for library, modules in ((pyreft, theirs), (reft_kernels, ours)):
        config = library.ReftConfig(representations=entries(modules, **(entry or {})))
        made.append(library.get_reft_model(llama(), config))
    return made[0], made[1]


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 8))}


class Dispatched(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


# What it costs


def test_R_is_computed_three_times_a_forward() -> None:
    counts = []
    for model in two():
        with Dispatched() as ops:
            model(inputs(), unit_locations=WHERE)
            model(inputs(), unit_locations=WHERE)
        counts.append(ops.count("householder_product") + ops.count("orthonormalize_forward"))
    assert counts[0] == 2 * 3 * len(LAYERS)
    assert counts[1] <= 1  # of all layers at once, and none in the second forward


def test_a_d_by_d_buffer_for_every_R() -> None:
    """At d = 4096 it is 64 MiB an intervention."""
    sizes = [
        sum(buffer.numel() for buffer in library.LoreftIntervention(**settings("LoreftIntervention", 256, 4)).buffers())
        for library in (pyreft, reft_kernels)
    ]
    assert sizes[0] >= 256 * 256
    assert sizes[1] <= 256 * 4 + 4


def test_hundreds_of_operations_in_a_backward() -> None:
    counts = []
    for model in two():
        base = inputs()
        loss = model(base, unit_locations=WHERE, labels=base["input_ids"])[1].loss
        with Dispatched() as ops:
            loss.backward()
        counts.append(len(ops.names))
    assert counts[0] - counts[1] > 250 * len(LAYERS)


@torch.no_grad()
def test_the_hidden_state_is_copied_for_every_intervention() -> None:
    counts = []
    for model in two():
        model(inputs(), unit_locations=WHERE)
        with Dispatched() as ops:
            model(inputs(), unit_locations=WHERE)
        counts.append(ops.count("aten.clone"))
    assert counts[0] - counts[1] >= len(LAYERS)


# Weights


def test_one_decayed_step_and_R_is_zero() -> None:
    norms = []
    for library in (pyreft, reft_kernels):
        module = library.LoreftIntervention(**settings("LoreftIntervention", WIDTH, RANK))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.06)
        module(torch.randn(4, WIDTH)).square().sum().backward()
        optimizer.step()
        R = module.rotate_layer.weight.detach()
        norms.append(float((R.T @ R).diagonal().min()))
    assert norms[0] == 0.0
    assert abs(norms[1] - 1.0) < 1e-6


def test_a_default_intervention_cannot_edit_a_float32_model() -> None:
    h = torch.randn(2, 3, WIDTH)
    for name in ("LoreftIntervention", "NoreftIntervention", "NodireftIntervention"):
        sizes = {"embed_dim": WIDTH, "low_rank_dimension": RANK, "add_bias": False}
        with pytest.raises(RuntimeError, match="same dtype"):
            getattr(pyreft, name)(**sizes)(h)
        assert getattr(reft_kernels, name)(**sizes)(h).dtype == torch.float32
        assert getattr(reft_kernels, name)(**sizes, dtype=torch.bfloat16)(h).dtype == torch.float32


def test_a_bias_that_nothing_depends_on() -> None:
    """DistributedDataParallel stops at a parameter without a gradient."""
    without = []
    for library in (pyreft, reft_kernels):
        module = library.NodireftIntervention(**settings("NodireftIntervention", WIDTH, RANK, add_bias=True))
        module(torch.randn(4, WIDTH)).sum().backward()
        without.append([name for name, p in module.named_parameters() if p.grad is None])
    assert without == [["proj_layer.bias"], []]


def test_add_bias_has_no_default() -> None:
    sizes = {"embed_dim": WIDTH, "low_rank_dimension": RANK}
    for name in ("NoreftIntervention", "NodireftIntervention"):
        with pytest.raises(KeyError, match="add_bias"):
            getattr(pyreft, name)(**sizes)
        getattr(reft_kernels, name)(**sizes)


@torch.no_grad()
def test_unknown_keywords_are_swallowed() -> None:
    sizes = {"embed_dim": WIDTH, "low_rank_dimension": RANK, "dropuot": 0.1}
    pyreft.LoreftIntervention(**sizes)
    with pytest.warns(UserWarning, match="no effect of dropuot"):
        reft_kernels.LoreftIntervention(**sizes)


# The model


@torch.no_grad()
def test_eval_leaves_dropout_on() -> None:
    same = []
    for model in two(dropout=0.5):
        model.eval()
        base = inputs()
        one, other = (model(base, unit_locations=WHERE)[1].logits for _ in range(2))
        same.append(torch.equal(one, other))
    assert same == [False, True]


def test_train_returns_nothing() -> None:
    theirs, ours = two()
    assert theirs.train() is None
    assert ours.train() is ours


@torch.no_grad()
def test_other_peoples_hooks_are_removed() -> None:
    seen = []
    for model in two():
        calls: list[int] = []
        model.model.model.layers[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.model.model.layers[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(inputs(), unit_locations=WHERE)
        model(inputs(), unit_locations=WHERE)
        seen.append(len(calls))
    assert seen == [0, 4]


@torch.no_grad()
def test_an_int_position_spoils_every_later_call() -> None:
    differences = []
    for model in two():
        base = inputs()
        right = model(base, unit_locations=WHERE)[1].logits
        model(base, unit_locations={"sources->base": (None, 3)})
        differences.append(float((model(base, unit_locations=WHERE)[1].logits - right).abs().max()))
    assert differences[0] > 1e-2
    assert differences[1] == 0.0


def test_named_parameters_is_a_list_without_the_modules_name() -> None:
    """get_parameter, and whatever wraps a module by the names of its parameters, cannot find them."""
    theirs, ours = two()
    name, _ = theirs.named_parameters()[0]
    with pytest.raises(AttributeError):
        theirs.get_parameter(name)
    for name, parameter in ours.named_parameters():
        assert ours.get_parameter(name) is parameter


def test_scripts_for_older_pyvene_index_interventions() -> None:
    theirs, ours = two()
    (one, *_), (other, *_) = theirs.interventions.values(), ours.interventions.values()
    with pytest.raises(TypeError, match="not subscriptable"):
        one[0].eval()
    assert other[0].eval() is other


def test_gradient_checkpointing_is_not_there() -> None:
    theirs, ours = two()
    with pytest.raises(AttributeError, match="gradient_checkpointing_enable"):
        theirs.gradient_checkpointing_enable()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert ours.model.is_gradient_checkpointing


def test_checkpointed_components_inside_of_a_block() -> None:
    """pyvene's hooks are gone when the block is computed again."""
    theirs, ours = two(entry={"component": "mlp_output"})
    base = inputs()
    theirs.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    theirs.model.train()
    loss = theirs(base, unit_locations=WHERE, labels=base["input_ids"])[1].loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train()
        ours.zero_grad()
        ours(base, unit_locations=WHERE, labels=base["input_ids"])[1].loss.backward()
        gradients.append([p.grad.clone() for p in ours.interventions.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_linked_interventions_edit_the_first_ones_result() -> None:
    """Two layers that share an intervention: pyvene hands to the second what it made for the first."""
    base = inputs()
    outputs = []
    for library in (pyreft, reft_kernels):
        torch.manual_seed(0)
        shared = library.NoreftIntervention(**settings("NoreftIntervention", WIDTH, RANK, add_bias=False))
        linked = entries([shared, copy.deepcopy(shared)], intervention_link_key=0)
        apart = entries([shared, copy.deepcopy(shared)])
        found = []
        for listed in (linked, apart):
            model = library.get_reft_model(llama(), library.ReftConfig(representations=listed))
            with torch.no_grad():
                found.append(model(base, unit_locations=WHERE)[1].logits)
        outputs.append(torch.allclose(*found, atol=1e-5))
    assert outputs == [False, True]


@torch.no_grad()
def test_prompts_padded_on_the_left_need_shifted_positions() -> None:
    """The same prompt alone and in a padded batch. pyreft's positions count from the row's padding."""
    theirs, ours = two()
    prompt = torch.randint(3, 64, (1, 5))
    padded = {"input_ids": torch.nn.functional.pad(prompt, (3, 0)), "attention_mask": torch.tensor([[0] * 3 + [1] * 5])}
    alone = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    positions = {"sources->base": (None, [[[0, 4]]] * 2)}
    differences = []
    for run in (
        lambda batch: theirs(batch, unit_locations=positions)[1],
        lambda batch: ours(**batch, positions="f1+l1"),
    ):
        one, other = run(alone).logits[:, -1], run(padded).logits[:, -1]
        differences.append(float((one - other).abs().max()))
    assert differences[0] > 1e-2
    assert differences[1] < 1e-4


def test_the_model_cannot_be_compiled_whole() -> None:
    theirs, ours = two()
    base = inputs()
    where = torch.tensor(WHERE["sources->base"][1])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, fullgraph=True, backend="eager")(base, unit_locations=WHERE)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected = ours(**base, intervention_locations=where.transpose(0, 1)).logits
    actual = compiled(**base, intervention_locations=where.transpose(0, 1)).logits
    torch._dynamo.reset()
    assert torch.allclose(actual, expected, atol=1e-5)


@torch.no_grad()
def test_index_tensors_are_made_from_lists_at_every_intervention() -> None:
    """On a GPU each is a copy from the host. Ours takes a tensor on the device, and makes one of lists."""
    theirs, ours = two()
    table = torch.tensor(WHERE["sources->base"][1])
    counts = []
    for model, where in ((theirs, WHERE), (ours, WHERE), (ours, table)):
        model(inputs(), unit_locations=where)
        base = inputs()
        with Dispatched() as ops:
            model(base, unit_locations=where)
        counts.append(ops.count("lift_fresh"))
    plain = _made_without_edits(inputs())
    assert counts[0] - plain >= 2 * len(LAYERS)
    assert counts[1] - plain <= 1
    assert counts[2] == plain


def _made_without_edits(base: dict[str, torch.Tensor]) -> int:
    model = llama()
    with Dispatched() as ops:
        model(**base)
    return ops.count("lift_fresh")


def test_a_module_shared_by_two_places_is_counted_twice() -> None:
    counts = []
    for library in (pyreft, reft_kernels):
        shared = library.NoreftIntervention(**settings("NoreftIntervention", WIDTH, RANK, add_bias=False))
        model = library.get_reft_model(llama(), library.ReftConfig(representations=entries([shared, shared])))
        counts.append(model.count_parameters())
    assert counts[0] == 2 * counts[1] == 2 * (2 * RANK * WIDTH + RANK)


def test_a_layer_that_does_not_exist_has_no_name_in_the_error() -> None:
    theirs = entries([stock("LoreftIntervention", WIDTH, RANK)] * 2)
    theirs[1]["layer"] = 7
    with pytest.raises(IndexError, match="out of range"):
        pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=theirs))
    ours = entries([reft_kernels.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=RANK)] * 2)
    ours[1]["layer"] = 7
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        reft_kernels.get_reft_model(llama(), reft_kernels.ReftConfig(representations=ours))


def test_a_short_position_string_is_half_read() -> None:
    """pyreft reads "all" as an error of int() and "x3" as no position at all."""
    with pytest.raises(ValueError, match="invalid literal"):
        pyreft.parse_positions("all")
    assert pyreft.parse_positions("3") == (0, 0)
    with pytest.raises(ValueError, match="positions must be 'fN'"):
        reft_kernels.parse_positions("3")


def test_the_peer_is_the_one_that_was_studied() -> None:
    assert pyvene.IntervenableModel.__module__ == "pyvene.models.intervenable_base"
