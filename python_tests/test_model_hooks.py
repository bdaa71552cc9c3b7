"""What a ReftModel leaves alone, its gradients, modes, copies, threads, and interventions of one's own."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import transformers
from functorch.compile import make_boxed_func
from hand_edits import edited_by_hand, strengthen
from tiny_models import ARCHITECTURES, LAYERS, WIDTH, random_batch, tiny_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.fx_passes import post_grad
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels.config import ReftConfig
from reft_kernels.hooks import edit_with
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.plan import active_plan


def make(model: Any, **settings: Any) -> ReftModel:
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", "tied": False}
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_model_by_itself_is_unedited(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = random_batch([6, 4])
    before = model(**batch).logits
    reft_model = make(model)
    edited = reft_model(**batch).logits
    assert model(**batch).logits.equal(before)
    assert not edited.equal(before)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    handle = blocks[1].register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        reft_model(**batch)
    handle.remove()
    assert model(**batch).logits.equal(before)  # after a failed call, too
    assert reft_model(**batch).logits.equal(edited)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_other_hooks_stay() -> None:
    model = tiny_model("llama")
    calls: list[str] = []
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *_: calls.append("before"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    reft_model = make(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(_first(output).clone()))
    batch = random_batch([5])
    for _ in range(2):
        reft_model(**batch)
    reft_model.generate(**batch, max_new_tokens=2)
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(after) == sum(hooks) + 1
    assert calls == ["pre", "before"] * 4
    plain = seen[0]
    model(**batch)
    assert not seen[-1].equal(plain)  # a hook set later sees the edit


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def test_hooks_are_registered_once_and_can_go() -> None:
    model = tiny_model("llama")
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    reft_model = make(model)
    layer = model.model.layers[0]
    assert len(layer._forward_hooks) == 1  # prefix and suffix are one edit
    reft_model(**random_batch([5]))
    assert len(layer._forward_hooks) == 1
    reft_model.remove_hooks()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_two_adapters_of_one_model() -> None:
    model = tiny_model("llama")
    batch = random_batch([6])
    first = make(model)
    alone = first(**batch).logits
    second = make(model, positions="l1", tied=True)
    edited = second(**batch).logits
    assert first(**batch).logits.equal(alone)
    assert not edited.equal(alone)
    # One around the other: both edit, the inner model's hooks first.
    path = "model.model.layers[2].output"
    outer = get_reft_model(first, ReftConfig({"component": path, "intervention": Scaled(1.0)}))
    assert outer(**batch).logits.equal(alone)
    outer.interventions[f"comp_{path.replace('.', '_')}_unit_pos_nunit_1#0"].factor.data.fill_(-2.0)
    assert not outer(**batch).logits.equal(alone)


def test_a_call_within_a_call() -> None:
    """An intervention that calls the same model through another ReftModel leaves the outer call's edits in force."""
    model = tiny_model("llama")
    batch = random_batch([6])
    inner = make(model)
    asked: list[Tensor] = []

    class Asks(nn.Module):
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            asked.append(inner(**batch).logits)
            return base

    config = ReftConfig([{"layer": 0, "intervention": Asks()}, {"layer": 2, "intervention": Scaled(-2.0)}])
    outer = get_reft_model(model, config)
    with edited_by_hand([(model.model.layers[2], "output", Scaled(-2.0), None)]):
        wanted = model(**batch).logits
    torch.testing.assert_close(outer(**batch).logits, wanted)
    assert asked[0].equal(inner(**batch).logits)


def test_threads_do_not_mix() -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    batches = [random_batch([4 + k]) for k in range(4)]
    wanted = [reft_model(**batch).logits for batch in batches]
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        with torch.no_grad():
            found[k] = [reft_model(**batches[k]).logits for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert all(logits.equal(wanted[k]) for logits in found[k])


def test_copies_edit_by_themselves() -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    batch = random_batch([6])
    wanted = reft_model(**batch).logits
    twin = copy.deepcopy(reft_model)
    assert twin(**batch).logits.equal(wanted)
    with torch.no_grad():
        next(iter(reft_model.interventions.values())).learned_source.weight.zero_()
    assert twin(**batch).logits.equal(wanted)
    assert not reft_model(**batch).logits.equal(wanted)
    bare = copy.deepcopy(twin.model)
    assert bare(**batch).logits.equal(twin.model(**batch).logits)
    assert pickle.loads(pickle.dumps(twin))(**batch).logits.equal(wanted)


def test_the_base_model_does_not_keep_the_adapter_alive() -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    reft_model(**random_batch([6]))
    weak = weakref.ref(reft_model)
    del reft_model
    gc.collect()
    assert weak() is None


def gradients(reft_model: ReftModel, batch: dict[str, Tensor]) -> list[Tensor]:
    reft_model.zero_grad()
    reft_model(**batch, labels=batch["input_ids"]).loss.backward()
    return [p.grad.clone() for p in reft_model.parameters() if p.grad is not None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("trained_base", [False, True])
def test_gradients_are_those_of_edits_by_hand(architecture: str, trained_base: bool) -> None:
    model = tiny_model(architecture)
    reft_model = make(model, positions=None, tied=True)
    model.requires_grad_(trained_base)
    batch = random_batch([6, 6])
    rows = [[0, 4], [3, 5]]
    if architecture in ("bert", "roberta"):
        batch["labels"] = torch.tensor([0, 1])
    else:
        batch["labels"] = batch["input_ids"]
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    modules = list(reft_model.interventions.values())
    edits: list[Any] = [(blocks[i], "output", modules[i], rows) for i in range(LAYERS)]
    parameters = [p for p in reft_model.parameters() if p.requires_grad]
    with edited_by_hand(edits):
        loss = model(**batch).loss
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {}
    for inplace in (True, False):
        reft_model.inplace = inplace
        loss = reft_model(**batch, unit_locations=[rows] * LAYERS).loss
        found[inplace] = torch.autograd.grad(loss, parameters, allow_unused=True)
    for hand, written, copied in zip(wanted, found[True], found[False], strict=True):
        assert (hand is None) == (written is None) == (copied is None)
        if hand is not None and written is not None and copied is not None:
            torch.testing.assert_close(written, hand, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(written, copied, rtol=1e-5, atol=1e-7)


def test_edits_of_blocks_are_made_in_place() -> None:
    outputs: dict[str, list[Any]] = {"before": [], "after": []}
    fresh = tiny_model("llama")
    fresh.model.layers[1].register_forward_hook(lambda m, a, output: outputs["before"].append(_first(output)))
    reft_model = make(fresh)
    fresh.model.layers[1].register_forward_hook(lambda m, a, output: outputs["after"].append(_first(output)))
    batch = random_batch([6])
    with torch.no_grad():
        reft_model(**batch)
        reft_model.inplace = False
        reft_model(**batch)
    (first, second), (edited_first, edited_second) = outputs["before"], outputs["after"]
    assert first.data_ptr() == edited_first.data_ptr()
    assert second.data_ptr() != edited_second.data_ptr()
    assert edited_first.equal(edited_second)


class WritesItsInput(nn.Module):
    """A block that adds into the hidden state that it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states.add_(1)
        return self.inner(hidden_states, *args, **kwargs)


def test_a_model_that_writes_what_was_edited_is_told_which_setting_to_change() -> None:
    batch = random_batch([6, 4])
    grads = []
    for rebuild in (True, False):
        model = tiny_model("llama")
        model.model.layers[2] = WritesItsInput(model.model.layers[2])
        torch.manual_seed(1)
        reft_model = get_reft_model(
            model, ReftConfig(method="loreft", layers=[1], rank=2, positions="f1+l1", rebuild=rebuild)
        )
        loss = reft_model(**batch, labels=batch["input_ids"]).loss
        if rebuild:
            message = r"(?s)modified by an inplace operation.*output of model.layers\[1\].*ReftConfig\(rebuild=False\)"
            with pytest.raises(RuntimeError, match=message):
                loss.backward()
            reft_model.config.rebuild = False
            loss = reft_model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        grads.append([p.grad for p in reft_model.interventions.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rebuilt_rows_give_the_same_gradients(dropout: float) -> None:
    """Two edits of one module: the first keeps its rows, as the second writes them again."""
    batch = random_batch([8, 5])
    batch["labels"] = batch["input_ids"]
    found = {}
    for rebuild in (True, False):
        torch.manual_seed(2)
        model = tiny_model("llama")
        interventions = [LoreftIntervention(embed_dim=16, low_rank_dimension=2, dropout=dropout) for _ in range(4)]
        places = [(1, interventions[0]), (1, interventions[1]), (2, interventions[2]), (2, interventions[3])]
        reft_model = get_reft_model(
            model,
            ReftConfig([{"layer": layer, "intervention": module} for layer, module in places], rebuild=rebuild),
        )
        strengthen(reft_model.interventions)
        reft_model(**batch, unit_locations=[[[0, 3]] * 2, [[3, 2]] * 2, [[1, 2]] * 2, [[1, 4]] * 2]).loss.backward()
        found[rebuild] = [p.grad for p in reft_model.interventions.parameters()]
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Keeps(nn.Module):
    """A block whose output is one of the caller's own tensors, or a view of it."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :] if self.view else x


class Toy(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Keeps(view)])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        out: Tensor = self.layers[0](inputs_embeds)
        return out


@pytest.mark.parametrize("view", [True, False])
def test_nothing_of_the_callers_is_written(view: bool) -> None:
    reft_model = get_reft_model(
        Toy(view),
        ReftConfig({"layer": 0, "intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)}),
    )
    x = torch.randn(2, 4, WIDTH, requires_grad=True)
    kept = x.detach().clone()
    out = reft_model(inputs_embeds=x, unit_locations=[1])
    assert x.detach().equal(kept)
    assert not out.equal(x)
    out.sum().backward()
    with torch.inference_mode():
        frozen = torch.randn(2, 4, WIDTH)
    kept = frozen.clone()
    with torch.no_grad():
        assert not reft_model(inputs_embeds=frozen, unit_locations=[1]).equal(kept)
    assert frozen.equal(kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Any) -> None:
    reft_model = make(tiny_model("gpt2"))
    batch = random_batch([6])
    wanted = reft_model(**batch).logits.detach()
    with mode():
        torch.testing.assert_close(reft_model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


class Outputs(nn.Module):
    """Gives its input in one of the forms that modules give."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, *, x: Tensor) -> Any:
        if self.form == "model output":
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x * 1, attentions=(x,))
        if self.form == "named tuple":
            return torch.return_types.max((x * 1, x))  # type: ignore[attr-defined]
        return {"tuple": (x * 1, None), "list": [x * 1, x], "dict": OrderedDict(a=x * 1, b=x)}[self.form]


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "model output"])
def test_forms_of_outputs(form: str) -> None:
    model = nn.ModuleDict({"part": Outputs(form)})
    model.forward = lambda input_ids, x: model["part"](x=x)  # type: ignore[method-assign]
    module = LoreftIntervention(embed_dim=4, low_rank_dimension=1)
    x = torch.randn(1, 3, 4)
    for path in ("part.output", "part.input"):
        reft_model = get_reft_model(model, ReftConfig({"component": path, "intervention": module}))
        output = reft_model(input_ids=torch.ones(1, 3, dtype=torch.long), x=x, unit_locations=[1])
        assert type(output) is type(model["part"](x=x))
        first = next(iter(output.values())) if hasattr(output, "values") else output[0]
        assert first[:, [0, 2]].equal(x[:, [0, 2]])
        torch.testing.assert_close(first[:, 1], module(x[:, 1]))
        if form == "model output" and path == "part.output":
            assert output.last_hidden_state is first
            assert output.attentions[0] is x
        reft_model.remove_hooks()


def test_outputs_that_cannot_be_edited() -> None:
    model = nn.ModuleDict({"part": nn.Identity()})
    model.forward = lambda input_ids: model["part"](input_ids)  # type: ignore[method-assign]
    module = LoreftIntervention(embed_dim=4, low_rank_dimension=1)
    reft_model = get_reft_model(model, ReftConfig({"component": "part.output", "intervention": module}))
    with pytest.raises(TypeError, match=r"part: its output must be a floating-point tensor.*int64"):
        reft_model(input_ids=torch.ones(1, 3, dtype=torch.long))


class Scaled(nn.Module):
    """An intervention that is none of ours."""

    def __init__(self, factor: float = 3.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base * self.factor * (1 if subspaces is None else len(subspaces[0]))


class Softened(LoreftIntervention):
    """A subclass of ours with a forward of its own."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return (base + super().forward(base)) / 2


@pytest.mark.parametrize("kind", ["scaled", "softened"])
@pytest.mark.parametrize("table", [[[[0, 5], [1, -1]], [[3, 0], [-1, 4]]], [[[0, 5], [1, -1]], [[3, 1], [-1, 4]]]])
def test_interventions_of_ones_own(kind: str, table: Any) -> None:
    model = tiny_model("llama")
    own = Scaled() if kind == "scaled" else Softened(embed_dim=WIDTH, low_rank_dimension=2)
    ours = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    strengthen(own)
    config = ReftConfig([{"layer": 1, "intervention": ours}, {"layer": 1, "intervention": own}])
    reft_model = get_reft_model(model, config).eval()
    batch = random_batch([6, 6])
    with edited_by_hand(
        [(model.model.layers[1], "output", m, rows) for m, rows in zip([ours, own], table, strict=True)]
    ):
        wanted = model(**batch).logits
    found = reft_model(**batch, unit_locations=table).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters() if p is not own)


def test_subspaces_reach_ones_own_interventions() -> None:
    model = tiny_model("llama")
    reft_model = get_reft_model(model, ReftConfig({"layer": 1, "intervention": Scaled(2.0)}))
    batch = random_batch([4, 4])
    four = reft_model(**batch, unit_locations=1, subspaces=[0, 1]).logits
    reft_model.interventions["layer_1_comp_block_output_unit_pos_nunit_1#0"].factor.data.fill_(4.0)
    torch.testing.assert_close(four, reft_model(**batch, unit_locations=1).logits)
    torch.testing.assert_close(four, reft_model(**batch, unit_locations=1, subspaces=[[[7], [7]]]).logits)
    with pytest.raises(ValueError, match="with 1 interventions, got 2"):
        reft_model(**batch, subspaces=[[[1], [1]], [[1], [1]]])


def test_rows_of_ones_own_interventions() -> None:
    """Rows not named keep their bits, also where the slots that name none would fall on an edited row."""
    h = torch.randn(2, 3, 4, requires_grad=True)
    positions = torch.tensor([[0, -1, 7], [-1, 2, -1]])
    out = edit_with(Scaled(5.0), h, positions)
    wanted = h.detach().clone()
    wanted[0, 0] *= 5
    wanted[1, 2] *= 5
    assert out.equal(wanted)
    out.sum().backward()
    assert h.grad is not None
    assert h.grad.equal(torch.where(wanted == h, 1.0, 5.0))
    with pytest.raises(ValueError, match=r"the shape of its rows, \[2, 3, 4\], got \[2, 3, 2\]"):
        edit_with(_Half(), h, positions)
    with pytest.raises(TypeError, match="must return a tensor, got str"):
        edit_with(_Wrong(), h, None)


class _Half(nn.Module):
    def forward(self, base: Tensor, source: Any, subspaces: Any) -> Tensor:
        return base[..., :2]


class _Wrong(nn.Module):
    def forward(self, base: Tensor, source: Any, subspaces: Any) -> str:
        return "?"


def test_train_and_eval_reach_everything() -> None:
    model = tiny_model("llama").train()
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers=[0], rank=2, positions="f1", dropout=0.5))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    batch = random_batch([6])
    reft_model.train()
    assert all(module.training for module in reft_model.modules())
    assert not reft_model(**batch).logits.equal(reft_model(**batch).logits)
    reft_model.eval()
    assert not any(module.training for module in reft_model.modules())
    assert reft_model(**batch).logits.equal(reft_model(**batch).logits)
    reft_model.enable_model_gradients()
    assert all(p.requires_grad for p in model.parameters())
    unfrozen = tiny_model("llama")
    get_reft_model(unfrozen, ReftConfig(method="loreft", layers=[0], rank=2), disable_model_grads=False)
    assert all(p.requires_grad for p in unfrozen.parameters())


def test_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers=[0, 1], rank=2))
    ours = 2 * (2 * WIDTH + 2 * WIDTH + 2)  # R, W and b
    assert reft_model.count_parameters() == ours
    total = sum(p.numel() for p in model.parameters())
    reft_model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable intervention params: {ours:,d} || trainable model params: 0\n"
        f"model params: {total:,d} || trainable%: {100 * ours / total}\n"
    )
    reft_model.enable_model_gradients()
    assert reft_model.count_parameters(include_model=True) == ours + total
    names = {name.split(".")[0] for name, _ in reft_model.named_parameters()}
    assert names == {"model", "interventions"}


def test_edits_can_be_disabled() -> None:
    reft_model = make(tiny_model("llama"))
    batch = random_batch([6, 4], side="left")
    options = {"max_new_tokens": 2, "do_sample": False}
    wanted, generated = reft_model(**batch).logits, reft_model.generate(**batch, **options)
    plain = reft_model.model(**batch).logits
    with reft_model.disable_edits():
        assert reft_model(**batch).logits.equal(plain)
        assert reft_model({"input_ids": batch["input_ids"]}, unit_locations=[[[0], [1]]] * 2 * LAYERS)[0] is None
        with reft_model.disable_edits():
            pass
        assert reft_model.generate(**batch, **options).equal(reft_model.model.generate(**batch, **options))
    with pytest.raises(ValueError, match="position 9"), reft_model.disable_edits():
        reft_model(**batch, unit_locations=9)
    assert reft_model(**batch).logits.equal(wanted)
    assert reft_model.generate(**batch, **options).equal(generated)


def test_calls_of_the_base_model_are_edited_where_it_is_asked_for() -> None:
    """Within ``edited``: what calls the base model itself, or its parts, is edited too."""
    model = tiny_model("llama")
    reft_model = make(model)
    batch = random_batch([6, 4])
    wanted = reft_model(**batch).logits
    assert not reft_model.is_editing()
    with reft_model.edited(batch):
        assert reft_model.is_editing()
        assert model(**batch).logits.equal(wanted)
        assert model.lm_head(model.model(**batch).last_hidden_state).equal(wanted)
    assert not reft_model.is_editing()
    assert not model(**batch).logits.equal(wanted)
    with reft_model.edited(batch, positions="l1"):
        assert model(**batch).logits.equal(reft_model(**batch, positions="l1").logits)


def test_no_plan_is_left_behind() -> None:
    reft_model = make(tiny_model("llama"))
    batch = random_batch([6])
    reft_model(**batch)
    reft_model.generate(**batch, max_new_tokens=2)
    assert active_plan(reft_model._owner) is None


def test_what_a_trainer_asks_for() -> None:
    reft_model = make(tiny_model("llama"))
    names = inspect.signature(reft_model.forward).parameters
    assert {"input_ids", "attention_mask", "labels", "intervention_locations"} <= set(names)
    assert reft_model.accepts_loss_kwargs == any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(reft_model.model.forward).parameters.values()
    )
    assert reft_model.config.to_json_string()
    assert (reft_model.device, reft_model.dtype) == (torch.device("cpu"), torch.float32)


def test_devices_are_those_of_the_modules() -> None:
    """On a model whose last block lies elsewhere, its intervention goes there and nothing of the base moves."""
    model = tiny_model("llama")
    model.model.layers[2].to("meta")
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2), set_device=False)
    model.hf_device_map = {"": "cpu"}
    model.model.layers[2]._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    reft_model.set_device("cpu")
    devices = [next(m.parameters()).device.type for m in reft_model.interventions.values()]
    assert devices == ["cpu", "cpu", "meta"]
    assert next(model.model.layers[2].parameters()).device.type == "meta"


class Reads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["positions", "unit_locations", "intervention_locations", "own intervention"])
def test_nothing_is_read_back_from_the_device(way: str) -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    batch = random_batch([6, 4])
    labels = batch["input_ids"].masked_fill(torch.arange(6) < 2, -100)
    keywords: dict[str, Any] = {"labels": labels}
    table = torch.randint(-1, 4, (2 * LAYERS, 2, 3))
    if way == "unit_locations":
        keywords["unit_locations"] = {"sources->base": (None, table)}
    elif way == "intervention_locations":
        keywords["intervention_locations"] = table.transpose(0, 1)
    elif way == "own intervention":
        reft_model = get_reft_model(model, ReftConfig({"layer": 1, "intervention": Scaled(), "positions": "f1+l1"}))
    with Reads() as base:
        model(**batch, labels=labels)
    with Reads() as edited:
        reft_model(**batch, **keywords)
    assert edited.names == base.names
    with Reads() as caught:  # the counter counts
        bool(torch.ones(1))
    assert caught.names


def test_compiles_in_one_graph() -> None:
    reft_model = make(tiny_model("llama"))
    batch = random_batch([6, 4])
    with torch.no_grad():
        wanted = reft_model(**batch).logits
        torch._dynamo.reset()
        compiled: Any = torch.compile(reft_model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"tied": True}, {"positions": None, "tied": True}], ids=str)
def test_a_compiled_training_step_is_one_graph_that_edits_in_place(settings: dict[str, Any]) -> None:
    reft_model = make(tiny_model("llama"), **settings)
    batch = random_batch([8, 8])
    batch["labels"] = batch["input_ids"]
    parameters = [p for p in reft_model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(reft_model(**batch).loss, parameters)
    torch._dynamo.reset()
    targets: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    compiled: Any = torch.compile(reft_model, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    found = torch.autograd.grad(compiled(**batch).loss, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    ours = [target for target in targets if "reft_kernels.edit" in target]
    assert not ours  # all of them stand in the functional form of what writes its operand
    assert sum("auto_functionalized" in target for target in targets) == 2 * LAYERS


@pytest.mark.slow
def test_a_compiled_training_step_copies_no_hidden_state(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    inner = post_grad.decompose_auto_functionalized

    def decompose(graph: torch.fx.Graph) -> object:
        result = inner(graph)
        graphs.append(graph)
        return result

    monkeypatch.setattr(post_grad, "decompose_auto_functionalized", decompose)
    reft_model = make(tiny_model("llama", num_hidden_layers=2), tied=True)
    batch = random_batch([8, 8])
    batch["labels"] = batch["input_ids"]
    parameters = [p for p in reft_model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(reft_model(**batch).loss, parameters)
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        loss = torch.compile(reft_model, fullgraph=True)(**batch).loss
        found = torch.autograd.grad(loss, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    ours = [str(node.target) for node in calls if "reft_kernels" in str(node.target)]
    assert ours == [
        "reft_kernels.orthonormalize_forward.default",
        *["reft_kernels.edit_forward_.default"] * 2,
        *["reft_kernels.edit_backward_.default"] * 2,
        "reft_kernels.orthonormalize_backward.default",
    ]
    copied = [
        list(node.meta["val"].shape)
        for node in calls
        if any(word in str(node.target) for word in ("clone", "copy")) and isinstance(node.meta.get("val"), Tensor)
    ]
    assert copied
    assert [2, 8, WIDTH] not in copied


def test_transformers_trainer(tmp_path: Path) -> None:
    """The plain Trainer trains the interventions and nothing else."""
    pytest.importorskip("accelerate")
    reft_model = make(tiny_model("llama"), positions=None, tied=True)
    frozen = {name: value.clone() for name, value in reft_model.model.state_dict().items()}
    item = {
        "input_ids": torch.randint(3, 50, (6,)),
        "attention_mask": torch.ones(6, dtype=torch.long),
        "labels": torch.tensor([-100, -100, -100, 4, 5, 6]),
        "intervention_locations": torch.tensor([[0, 2]] * LAYERS),
    }
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=0.05, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(reft_model, arguments, train_dataset=[item] * 8, eval_dataset=[item])
    before = trainer.evaluate()["eval_loss"]
    batch = {name: value[None] for name, value in item.items()}
    torch.testing.assert_close(torch.tensor(before), reft_model.eval()(**batch).loss.detach(), rtol=1e-4, atol=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    assert all(value.equal(frozen[name]) for name, value in reft_model.model.state_dict().items())


def test_hooks_go_with_their_reft_model() -> None:
    model = tiny_model("llama")
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2, positions="l1"))
    del reft_model
    gc.collect()
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert after == before
