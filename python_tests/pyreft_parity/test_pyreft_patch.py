"""patch_pyreft(): an installed pyreft with our edits gives what it gave, and is put back as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyreft
import pytest
import pyvene
import torch
from peer import CLASSES, WITH_PROJ, assert_equal_within, representations, settings, stock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from reft_kernels import patch_pyreft, unpatch_pyreft
from reft_kernels.compat.patched_interventions import fused_activation
from reft_kernels.rotate_layer import RotateLayer

LAYERS, WIDTH, RANK = (0, 2), 32, 3
LOCATIONS = [[[0, 4], [1, 2]], [[3, 5], [2, 6]]]
WHERE = {"sources->base": (None, LOCATIONS)}
OWNERS = [getattr(pyreft, name) for name in CLASSES] + [
    cls for cls in pyvene.IntervenableModel.__mro__ if cls.__module__.startswith("pyvene")
] + [pyreft.ReftModel, pyreft.ReftTrainer, pyreft.ReftTrainerForSequenceClassification]  # fmt: skip


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = [dict(vars(owner)) for owner in OWNERS]
    yield
    unpatch_pyreft()
    assert [dict(vars(owner)) for owner in OWNERS] == before


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def model_of(llama: nn.Module, modules: list[nn.Module], **entry: Any) -> Any:
    entries = [{**item, **entry} for item in representations(LAYERS, modules, RANK)]
    return pyreft.get_reft_model(copy.deepcopy(llama), pyreft.ReftConfig(representations=entries))


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 8))}


def new(name: str, **others: Any) -> nn.Module:
    """A new intervention of pyreft, fp32."""
    return getattr(pyreft, name)(**settings(name, WIDTH, RANK, **others))


def test_it_says_what_it_patched_and_nothing_is_skipped() -> None:
    report = patch_pyreft()
    assert patch_pyreft() is report
    assert not report.skipped
    assert "pyreft.interventions.LoreftIntervention.forward" in report.applied
    assert str(report).startswith("pyreft 0.1.0, pyvene 0.1.8: ")
    assert all(report.applied.values())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("act_fn", [None, "relu", "gelu", "gelu_new"])
def test_outputs_and_gradients_stay(llama: nn.Module, name: str, act_fn: str | None) -> None:
    """Of interventions made before the patch: the same parameters on both sides."""
    others: dict[str, Any] = {"add_bias": True} if name in WITH_PROJ else {}
    model = model_of(llama, [stock(name, WIDTH, RANK, act_fn=act_fn, **others) for _ in LAYERS])
    base = inputs()

    def run() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        model.set_zero_grad()
        outputs = model(base, unit_locations=WHERE, labels=base["input_ids"])[1]
        outputs.loss.backward()
        return outputs.logits.detach(), [p.grad for p in model.get_trainable_parameters()]

    expected, gradients = run()
    patch_pyreft()
    actual, found = run()
    assert_equal_within(actual, expected, 5e-6, "logits")
    for ours, theirs in zip(found, gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert_equal_within(ours, theirs, 3e-5, "gradient")


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_interventions_made_under_the_patch_run_unpatched(llama: nn.Module, name: str) -> None:
    patch_pyreft()
    others: dict[str, Any] = {"add_bias": True} if name in WITH_PROJ else {}
    modules = [new(name, **others) for _ in LAYERS]
    for module in modules:
        assert sum(b.numel() for b in module.buffers()) <= 2 + 2 * WIDTH * RANK  # no d x d
        if hasattr(module, "rotate_layer"):
            assert isinstance(module.rotate_layer, RotateLayer)
    model = model_of(llama, modules)
    base = inputs()
    actual = model(base, unit_locations=WHERE)[1].logits
    unpatch_pyreft()
    expected = model(base, unit_locations=WHERE)[1].logits
    assert_equal_within(actual, expected, 5e-6, "logits")


@pytest.mark.parametrize("intervene_on_prompt", [True, False])
@torch.no_grad()
def test_generation_stays(llama: nn.Module, intervene_on_prompt: bool) -> None:
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS])
    options = {"max_new_tokens": 6, "do_sample": False, "intervene_on_prompt": intervene_on_prompt}
    base, where = inputs(), WHERE if intervene_on_prompt else None
    expected = model.generate(base, unit_locations=where, **options)[1]
    patch_pyreft()
    assert torch.equal(model.generate(base, unit_locations=where, **options)[1], expected)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 2, "num_return_sequences": 2}])
@torch.no_grad()
def test_beams_of_one_prompt(llama: nn.Module, options: dict[str, Any]) -> None:
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS])
    for module in model.interventions.values():
        module.learned_source.bias.fill_(9)
    base = {name: ids[:1] for name, ids in inputs().items()}
    where = {"sources->base": (None, [[[0, 4, 7]], [[3, 6, 7]]])}
    options = {"max_new_tokens": 5, "do_sample": False, "intervene_on_prompt": True, **options}
    expected = model.generate(base, unit_locations=where, **options)[1]
    patch_pyreft()
    assert torch.equal(model.generate(base, unit_locations=where, **options)[1], expected)
    plain = model.model.generate(**base, max_new_tokens=5, do_sample=False, num_beams=options["num_beams"])
    assert plain[0].tolist() != expected[0].tolist()


@pytest.mark.parametrize("intervene_on_prompt", [True, False])
@torch.no_grad()
def test_beams_of_several_prompts_are_those_of_each(llama: nn.Module, intervene_on_prompt: bool) -> None:
    """Stock cannot; of tokens it writes the first beam's row into all beams."""
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS])
    for module in model.interventions.values():
        module.learned_source.bias.fill_(9)
    base = inputs()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "intervene_on_prompt": intervene_on_prompt}
    locations = [[[0, 7], [6, 5]], [[7, 6], [2, 7]]]
    patch_pyreft()

    def generate(rows: slice) -> torch.Tensor:
        where = {"sources->base": (None, [layer[rows] for layer in locations])} if intervene_on_prompt else None
        return model.generate({"input_ids": base["input_ids"][rows]}, unit_locations=where, **options)[1]

    assert torch.equal(generate(slice(2)), torch.cat([generate(slice(1)), generate(slice(1, 2))]))


@torch.no_grad()
def test_rows_of_positions_that_differ_in_length(llama: nn.Module) -> None:
    patch_pyreft()
    model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
    for ragged in ([[], [3]], [[3], []], [[1, 2], [3]]):
        with pytest.raises(ValueError, match="unit_locations: expected rows of one length"):
            model(inputs(), unit_locations={"sources->base": (None, [ragged, ragged])})


@pytest.mark.parametrize(
    "component",
    ["mlp_output", "attention_output", "block_input", "model.layers[1].mlp.output", "model.layers[1].mlp.input"],
)
@torch.no_grad()
def test_other_components_stay(llama: nn.Module, component: str) -> None:
    modules = [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS]
    model = model_of(llama, modules, component=component)
    base = inputs()
    expected = model(base, unit_locations=WHERE)[1].logits
    patch_pyreft()
    assert_equal_within(model(base, unit_locations=WHERE)[1].logits, expected, 5e-6, "logits")


def _two_layers(module: Any) -> None:
    module.learned_source = nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, RANK))


def _own_dropout(module: Any) -> None:
    module.dropout = nn.Tanh()


def _own_forward(module: Any) -> None:
    stock_class = type(module)
    module.forward = lambda base, source=None, subspaces=None: 2 * stock_class.forward(module, base)


def _forward_hook(module: Any) -> None:
    module.register_forward_hook(lambda _, args, output: 2 * output)


def _pre_hook(module: Any) -> None:
    module.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def _hook_of_a_part(module: Any) -> None:
    module.learned_source.register_forward_hook(lambda _, args, output: 2 * output)


def _forward_of_a_part(module: Any) -> None:
    layer = module.rotate_layer
    layer.forward = lambda x: 2 * (x @ layer.weight)


def _own_linear(module: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    module.learned_source = Doubled(WIDTH, RANK)


def _own_activation(module: Any) -> None:
    class ReLU(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input.square()

    module.act_fn = ReLU()


def _biasless(module: Any) -> None:
    module.learned_source = nn.Linear(WIDTH, RANK, bias=False)


def _drop_all(module: Any) -> None:
    module.dropout = nn.Dropout(1.0)


@pytest.mark.parametrize(
    "change",
    [
        _two_layers, _own_dropout, _own_forward, _forward_hook, _pre_hook, _hook_of_a_part, _forward_of_a_part,
        _own_linear, _own_activation, _biasless, _drop_all,
    ],
)  # fmt: skip
@torch.no_grad()
def test_changed_interventions_run_as_in_stock(llama: nn.Module, change: Callable[[Any], None]) -> None:
    modules = [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS]
    model = model_of(llama, modules)
    base = inputs()
    unchanged = model(base, unit_locations=WHERE)[1].logits
    for module in modules:
        change(module)
    expected, rows = model(base, unit_locations=WHERE)[1].logits, modules[0](torch.ones(2, WIDTH))
    assert not torch.equal(expected, unchanged)
    patch_pyreft()
    assert_equal_within(model(base, unit_locations=WHERE)[1].logits, expected, 5e-6, "logits")
    assert_equal_within(modules[0](torch.ones(2, WIDTH)), rows, 5e-6, "rows")


@torch.no_grad()
def test_a_part_in_a_mode_of_its_own(llama: nn.Module) -> None:
    patch_pyreft()
    model = model_of(llama, [new("LoreftIntervention", dropout=0.5) for _ in LAYERS])
    for module in model.interventions.values():
        module.dropout.eval()
    base = inputs()
    one, other = (model(base, unit_locations=WHERE)[1].logits for _ in range(2))
    assert torch.equal(one, other)


class _Ops(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_clone_no_householder_product_and_fewer_operations(llama: nn.Module) -> None:
    base = inputs()
    counts = []
    for patched in (False, True):
        if patched:
            patch_pyreft()
        model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
        model(base, unit_locations=WHERE)
        with _Ops() as ops:
            model(base, unit_locations=WHERE)
        counts.append({name: sum(name in op for op in ops.names) for name in ("clone", "householder", "aten")})
    before, after = counts
    assert before["householder"] == 3 * len(LAYERS)
    assert after["householder"] == 0
    assert after["clone"] <= before["clone"] - len(LAYERS)
    assert after["aten"] <= before["aten"] - 30 * len(LAYERS)


def test_other_peoples_hooks_stay(llama: nn.Module) -> None:
    model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
    seen: list[int] = []
    block = model.model.model.layers[1]
    block.register_forward_hook(lambda *_: seen.append(1))
    base = inputs()
    patch_pyreft()
    model(base, unit_locations=WHERE)
    model(base, unit_locations=WHERE)
    assert len(seen) == 2
    assert sum(len(module._forward_hooks) for module in model.model.modules()) == 1
    with pytest.raises(IndexError, match="outside of the 8 tokens"):
        model(base, unit_locations={"sources->base": (None, [[[0], [8]]] * 2)})
    model(base, unit_locations=WHERE)
    assert sum(len(module._forward_hooks) for module in model.model.modules()) == 1
    unpatch_pyreft()
    model(base, unit_locations=WHERE)
    assert len(seen) == 3  # pyvene runs it no more
    assert sum(len(module._forward_hooks) for module in model.model.modules()) == 0


@torch.no_grad()
def test_eval_reaches_the_interventions(llama: nn.Module) -> None:
    model = model_of(llama, [new("LoreftIntervention", dropout=0.5) for _ in LAYERS])
    base = inputs()
    model.eval()
    one, other = (model(base, unit_locations=WHERE)[1].logits for _ in range(2))
    assert not torch.equal(one, other)  # stock: dropout goes on
    patch_pyreft()
    assert model.eval() is model
    one, other = (model(base, unit_locations=WHERE)[1].logits for _ in range(2))
    assert torch.equal(one, other)
    assert model.train().interventions.training


@torch.no_grad()
def test_an_int_position_does_not_stick(llama: nn.Module) -> None:
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS])
    base = inputs()
    expected = model(base, unit_locations=WHERE)[1].logits
    model(base, unit_locations={"sources->base": (None, 3)})
    spoilt = model(base, unit_locations=WHERE)[1].logits
    assert not torch.allclose(spoilt[1], expected[1], atol=1e-3)
    model.use_fast = False
    patch_pyreft()
    model(base, unit_locations={"sources->base": (None, 3)})
    assert_equal_within(model(base, unit_locations=WHERE)[1].logits, expected, 5e-6, "logits")


@pytest.mark.parametrize("name", CLASSES)
def test_the_pair_of_older_pyvene(name: str) -> None:
    module = new(name, **({"add_bias": True} if name in WITH_PROJ else {}))
    with pytest.raises(TypeError, match="not subscriptable"):
        module[0]
    patch_pyreft()
    assert module[0] is module
    with pytest.raises(IndexError, match="index: expected 0"):
        module[1]


def test_weight_decay_leaves_R(llama: nn.Module) -> None:
    """Stock: one decayed step and R is zero for good."""
    for patched in (False, True):
        if patched:
            patch_pyreft()
        module = new("LoreftIntervention")
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.06)
        module(torch.randn(4, WIDTH)).square().sum().backward()
        optimizer.step()
        R = module.rotate_layer.weight.detach()
        error = (R.T @ R - torch.eye(RANK)).abs().max()
        assert (error < 1e-5) == patched
        assert (R.norm() == 0) == (not patched)


def test_without_pyreft_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("reft_kernels.compat.patch.importlib.import_module", missing)
    with pytest.raises(ImportError, match="needs pyreft and pyvene"):
        patch_pyreft()


# What the kernels do not edit is left to pyvene


def both_ways(model: Any, where: dict[str, Any], base: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of stock and under the patch."""
    with torch.no_grad():
        expected = model(base, unit_locations=where)[1].logits
        patch_pyreft()
        return expected, model(base, unit_locations=where)[1].logits


@pytest.mark.parametrize("act_fn", ["gelu_python", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "mish"])
def test_activations_are_those_of_their_names(llama: nn.Module, act_fn: str) -> None:
    model = model_of(llama, [stock("DireftIntervention", WIDTH, RANK, act_fn=act_fn) for _ in LAYERS])
    expected, actual = both_ways(model, WHERE, inputs())
    assert_equal_within(actual, expected, 5e-6, "logits")


def test_a_gelu_of_another_formula(llama: nn.Module) -> None:
    modules = [stock("LoreftIntervention", WIDTH, RANK, act_fn="gelu") for _ in LAYERS]
    for module in modules:
        assert fused_activation(module) == "gelu"
        module.act_fn.act = lambda x: 3 * nn.functional.gelu(x, approximate="tanh")
        assert fused_activation(module) is None
    expected, actual = both_ways(model_of(llama, modules), WHERE, inputs())
    assert_equal_within(actual, expected, 5e-6, "logits")


def test_a_unit_that_is_no_position(llama: nn.Module) -> None:
    """pyvene's unit "t" names all rows, wherever the location."""
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS], unit="t")
    base = {name: ids[:1] for name, ids in inputs().items()}
    expected, actual = both_ways(model, {"sources->base": (None, [[[0]], [[0]]])}, base)
    assert_equal_within(actual, expected, 5e-6, "logits")
    named = model_of(llama, list(model.interventions.values()))
    assert not torch.allclose(named(base, unit_locations={"sources->base": (None, [[[0]], [[0]]])})[1].logits, expected)


def test_the_heads_of_a_module(llama: nn.Module) -> None:
    modules = [stock("LoreftIntervention", WIDTH // 2, RANK) for _ in LAYERS]
    model = model_of(llama, modules, component="head_attention_value_output", unit="h")
    expected, actual = both_ways(model, {"sources->base": (None, [[[0], [1]], [[1], [0]]])}, inputs())
    assert_equal_within(actual, expected, 5e-6, "logits")


@pytest.mark.parametrize("component", ["query_output", "value_output"])
def test_a_part_of_a_modules_output(component: str) -> None:
    """GPT-2 has q, k and v in one row."""
    config = GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=64)
    gpt2 = GPT2LMHeadModel(config).eval()
    model = model_of(gpt2, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS], component=component)
    base = inputs()
    expected, actual = both_ways(model, WHERE, base)
    assert_equal_within(actual, expected, 5e-6, "logits")
    assert not torch.allclose(gpt2(**base).logits, expected, atol=1e-4)


def test_use_fast_as_it_was_made(llama: nn.Module) -> None:
    """Of all rows it writes the positions of the first."""
    modules = [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS]
    config = pyreft.ReftConfig(representations=representations(LAYERS, modules, RANK))
    model = pyreft.ReftModel(config, llama, use_fast=True)
    base = inputs()
    expected, actual = both_ways(model, WHERE, base)
    assert_equal_within(actual, expected, 5e-6, "logits")
    model.use_fast = False
    assert not torch.allclose(model(base, unit_locations=WHERE)[1].logits, expected, atol=1e-3)


@pytest.mark.parametrize("patched", [False, True])
def test_arguments_that_pyrefts_interventions_do_not_take(llama: nn.Module, patched: bool) -> None:
    if patched:
        patch_pyreft()
    model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
    with pytest.raises(TypeError, match="unexpected keyword argument 'factor'"):
        model(inputs(), unit_locations=WHERE, intervention_additional_kwargs={"factor": 2})
    model.as_adaptor = True
    with pytest.raises(TypeError, match="unexpected keyword argument 'args'"):
        model(inputs(), unit_locations=WHERE)


def test_linked_interventions(llama: nn.Module) -> None:
    """What the first of them has edited goes on from the second."""
    modules = [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS]
    model = model_of(llama, modules, intervention_link_key=0)
    base = inputs()
    expected, actual = both_ways(model, WHERE, base)
    assert_equal_within(actual, expected, 5e-6, "logits")
    apart = model_of(llama, [modules[0], modules[0]])
    assert not torch.allclose(apart(base, unit_locations=WHERE)[1].logits, expected, atol=1e-3)


# What the hooks leave behind


@torch.no_grad()
def test_positions_are_checked_anew_in_every_call(llama: nn.Module) -> None:
    patch_pyreft()
    model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
    base, where = inputs(), {"sources->base": (None, [[[7], [7]]] * 2)}
    model(base, unit_locations=where)
    with pytest.raises(IndexError, match="outside of the 5 tokens"):
        model({"input_ids": base["input_ids"][:, :5]}, unit_locations=where)


def test_what_a_module_saved_for_its_backward_is_not_written(llama: nn.Module) -> None:
    """ReLU saves its output, which stock overwrites."""
    llama.model.layers[1].mlp.act_fn = nn.ReLU()
    modules = [stock("LoreftIntervention", WIDTH, RANK), stock("LoreftIntervention", 48, RANK)]
    entries = [
        {"layer": 0, "component": "block_output", "low_rank_dimension": RANK, "intervention": modules[0]},
        {"component": "model.layers[1].mlp.act_fn.output", "low_rank_dimension": RANK, "intervention": modules[1]},
    ]
    model = pyreft.get_reft_model(llama, pyreft.ReftConfig(representations=entries))
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda _, args, output: outputs.append((output, output.detach().clone()))
    )
    base = inputs()
    patch_pyreft()
    model(base, unit_locations=WHERE, labels=base["input_ids"])[1].loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.get_trainable_parameters())
    ((output, before),) = outputs
    assert torch.equal(output, before)


@torch.no_grad()
def test_hooks_of_a_source_that_fails_are_removed(llama: nn.Module) -> None:
    patch_pyreft()
    vanilla = pyvene.VanillaIntervention(embed_dim=WIDTH)
    model = pyvene.IntervenableModel([{"layer": 1, "component": "block_output", "intervention": vanilla}], llama)
    base, where = inputs(), {"sources->base": ([[[1], [1]]], [[[2], [2]]])}
    expected = model(base, sources=[inputs()], unit_locations=where)[1].logits
    assert not torch.equal(expected, llama(**base).logits)
    with pytest.raises(IndexError):
        model(base, sources=[{"input_ids": torch.full((2, 8), 99)}], unit_locations=where)
    assert sum(len(module._forward_hooks) for module in llama.modules()) == 0


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_a_module_that_runs_twice_is_refused(llama: nn.Module, patched: bool) -> None:
    if patched:
        patch_pyreft()
    llama.model.layers[1] = llama.model.layers[0]
    model = model_of(llama, [new("LoreftIntervention") for _ in LAYERS])
    with pytest.raises(Exception, match="called only once"):
        model(inputs(), unit_locations=WHERE, use_cache=False)


def test_locations_in_a_tensor(llama: nn.Module) -> None:
    """A row that is named twice is edited once."""
    model = model_of(llama, [stock("LoreftIntervention", WIDTH, RANK) for _ in LAYERS])
    once = [[[0, 4], [1, 2]], [[3, 5], [2, 6]]]
    twice = [[[0, 4, 4], [1, 2, 1]], [[3, 5, 3], [2, 6, 6]]]
    base = inputs()

    def run(locations: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.set_zero_grad()
        outputs = model(base, unit_locations={"sources->base": (None, locations)}, labels=base["input_ids"])[1]
        outputs.loss.backward()
        return outputs.logits.detach(), [p.grad for p in model.get_trainable_parameters()]

    expected, gradients = run(once)
    patch_pyreft()
    actual, found = run(torch.tensor(twice))
    assert_equal_within(actual, expected, 5e-6, "logits")
    for ours, theirs in zip(found, gradients, strict=True):
        assert_equal_within(ours, theirs, 3e-5, "gradient")
