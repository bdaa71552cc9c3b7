"""What scripts written for pyreft call, under the names and with the results they know."""

from __future__ import annotations

import copy
import types
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

import reft_kernels as pyreft

RANK = 3
LOCATIONS = [[[0, 4], [1, 2]], [[3, 5], [2, 6]]]  # [num_interventions][B][P]
WHERE = {"sources->base": (None, LOCATIONS)}


def loreft(**others: Any) -> nn.Module:
    return pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=RANK, **others)


def entry(layer: int, intervention: Any = None) -> dict[str, Any]:
    intervention = loreft() if intervention is None else intervention
    return {
        "layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": intervention,
    }  # fmt: skip


def make(*entries: dict[str, Any], component: str | None = None, **others: Any) -> Any:
    listed = list(entries) or [entry(0), entry(2)]
    if component is not None:
        listed = [{**item, "component": component} for item in listed]
    config = pyreft.ReftConfig(representations=listed)
    return pyreft.get_reft_model(tiny_model("llama"), config, **others)


def inputs() -> dict[str, Tensor]:
    return random_batch([8, 8])


# Names


def test_every_name_of_pyreft() -> None:
    names = """TaskType ReftType get_reft_model ReftConfig ReftModel ReftTrainer ReftTrainerForCausalLM
        ReftTrainerForCausalLMDistributed ReftTrainerForSequenceClassification NoreftIntervention LoreftIntervention
        ConsreftIntervention LobireftIntervention DireftIntervention NodireftIntervention ReftDataCollator ReftDataset
        ReftRawDataset ReftSupervisedDataset ReftClassificationDataset ReftGenerationDataset ReftPreferenceDataset
        ReftRewardDataset ReftRewardCollator make_last_position_supervised_data_module
        make_last_position_supervised_chat_data_module make_multiple_position_supervised_data_module
        get_intervention_locations parse_positions"""
    for name in names.split():
        assert name in pyreft.__all__
        assert getattr(pyreft, name).__module__.startswith("reft_kernels.")
    assert pyreft.TaskType("CAUSAL_LM") is pyreft.TaskType.CAUSAL_LM == "CAUSAL_LM"
    assert pyreft.ReftType.NLOREFT.value == "NOREFT"


# Configs


def test_a_representation_as_pyvenes_tuple_or_list() -> None:
    fields = "layer component unit max_number_of_units low_rank_dimension intervention_type intervention"
    kind = namedtuple("RepresentationConfig", fields, defaults=(0, "block_output", "pos", 1, None, None, None))
    module = loreft()
    forms = [kind(layer=1, intervention=module), [1, "block_output", "pos", 1, RANK, None, module]]
    for form in (*forms, {"layer": 1, "intervention": module}):
        (item,) = pyreft.ReftConfig(representations=[form]).representations
        assert (item.layer, item.component, item.intervention) == (1, "block_output", module)
    by_type = kind(layer=1, low_rank_dimension=RANK)
    (item,) = pyreft.ReftConfig(by_type, intervention_types=pyreft.DireftIntervention).representations
    assert item.intervention_type is pyreft.DireftIntervention


def test_several_classes_and_more_representations() -> None:
    plain = {"component": "block_output", "low_rank_dimension": RANK}
    kinds = [pyreft.LoreftIntervention, pyreft.NodireftIntervention]
    config = pyreft.ReftConfig(
        representations=[{"layer": 0, **plain}, {"layer": 1, **plain}], intervention_types=kinds, mode="parallel"
    )
    config.add_intervention({"layer": 2, **plain, "intervention_type": pyreft.LobireftIntervention})
    assert config.intervention_types == [*kinds, pyreft.LobireftIntervention]
    model = pyreft.ReftModel(config, tiny_model("llama"))
    assert [type(module) for module in model.interventions.values()] == config.intervention_types
    with pytest.raises(ValueError, match="intervention_types must be one class, or 1 of them, got 2"):
        pyreft.ReftConfig(representations={"layer": 0, **plain}, intervention_types=kinds)
    with pytest.raises(ValueError, match="mode must be 'parallel', got 'serial'"):
        pyreft.ReftConfig(representations=entry(0), mode="serial")
    with pytest.raises(ValueError, match="this one has a method"):
        pyreft.ReftConfig(method="loreft", layers=[0], rank=1).add_intervention(entry(1))


def test_linked_representations_share_their_intervention() -> None:
    plain = {"low_rank_dimension": RANK, "intervention_type": pyreft.LoreftIntervention, "intervention_link_key": 0}
    model = make({"layer": 0, **plain}, {"layer": 2, **plain})
    one, other = model.interventions.values()
    assert one is other
    assert model.count_parameters() == 2 * RANK * WIDTH + RANK


@torch.no_grad()
def test_nothing_to_edit() -> None:
    """pyreft's baseline of LoRA alone has no interventions."""
    base = tiny_model("llama")
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=[]))
    ids = inputs()
    original, edited = model(ids, unit_locations={"sources->base": (None, 0)})
    assert original is None
    assert torch.equal(edited.logits, base(**ids).logits)
    assert model.count_parameters() == 0


# Calls


@torch.no_grad()
def test_a_function_as_intervention() -> None:
    model = make(entry(1, lambda base, source: base + 1.0))
    add = make({"layer": 1, "intervention": _Add(1.0)})
    ids = inputs()
    where = {"sources->base": (None, LOCATIONS[:1])}
    assert torch.equal(model(ids, unit_locations=where)[1].logits, add(ids, unit_locations=where)[1].logits)
    assert not torch.equal(model(ids, unit_locations=where)[1].logits, model.model(**ids).logits)


class _Add(nn.Module):
    """h + amount + extra; also returns a latent, as AxBench's interventions do."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, extra: float = 0.0) -> Any:
        return types.SimpleNamespace(output=base + self.amount + extra, latent=base.sum(-1))


@torch.no_grad()
def test_additional_keywords_and_full_outputs() -> None:
    model, ids = make(entry(1, _Add(1.0))), inputs()
    where = {"sources->base": (None, LOCATIONS[:1])}
    more = model(ids, unit_locations=where, intervention_additional_kwargs={"extra": 2.0})[1].logits
    (output,) = model.full_intervention_outputs
    assert output.latent.shape == (2, 2)
    three = make(entry(1, _Add(3.0)))(ids, unit_locations=where)[1].logits
    assert torch.allclose(more, three, atol=1e-5)
    model(ids, unit_locations=where)
    assert len(model.full_intervention_outputs) == 1
    with pytest.raises(ValueError, match=r"intervention_additional_kwargs .*\['extra'\]"):
        make()(ids, unit_locations=WHERE, intervention_additional_kwargs={"extra": 2.0})


@torch.no_grad()
def test_return_dict() -> None:
    model, ids = make(), inputs()
    output = model(ids, unit_locations=WHERE, return_dict=True, output_original_output=True)
    pair = model(ids, unit_locations=WHERE, output_original_output=True)
    assert torch.equal(output.original_outputs.logits, pair[0].logits)
    assert torch.equal(output.intervened_outputs.logits, pair[1].logits)
    assert output.collected_activations is None
    assert isinstance(model(**ids, return_dict=False), tuple)


class Subspaces(pyreft.LoreftIntervention):
    """Edits with the rows of R that each example names (pyreft's notebook on composition)."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        assert subspaces is not None
        delta = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        parts, rows = [], []
        for example, chosen in enumerate(subspaces):
            parts.append(delta[example, :, chosen])
            rows.append(self.rotate_layer.weight[..., chosen].T)
        edited = base + torch.bmm(torch.stack(parts), torch.stack(rows))
        return self.dropout(edited.to(base.dtype))


@torch.no_grad()
def test_subspaces() -> None:
    module = Subspaces(embed_dim=WIDTH, low_rank_dimension=RANK, act_fn="relu")
    model, ids = make(entry(1, module)), inputs()
    where = {"sources->base": (None, LOCATIONS[:1])}
    chosen = [[0, 2], [1, 2]]
    found = model(ids, unit_locations=where, subspaces=[chosen])[1].logits
    whole = make(entry(1, _plain_copy(module)))
    every = model(ids, unit_locations=where, subspaces=[[[0, 1, 2]] * 2])[1].logits
    assert torch.allclose(every, whole(ids, unit_locations=where)[1].logits, atol=1e-5)
    for example, rows in enumerate(chosen):
        one = {name: value[example : example + 1] for name, value in ids.items()}
        at = {"sources->base": (None, [LOCATIONS[0][example : example + 1]])}
        alone = model(one, unit_locations=at, subspaces=rows)[1].logits
        assert torch.allclose(alone[0], found[example], atol=1e-5)
        assert not torch.allclose(every[example], found[example], atol=1e-3)


@torch.no_grad()
def test_an_own_forward_on_the_rows_of_a_bf16_model() -> None:
    """It calls learned_source, in float32 unless it is told otherwise, on what the model has."""
    module, ids = Subspaces(embed_dim=WIDTH, low_rank_dimension=RANK), inputs()
    where = {"sources->base": (None, LOCATIONS[:1])}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        config = pyreft.ReftConfig(representations=entry(1, module))
        model = pyreft.get_reft_model(tiny_model("llama").to(dtype), config)
        found.append(model(ids, unit_locations=where, subspaces=[[[0, 2], [1, 2]]])[1].logits)
    assert found[1].dtype == torch.bfloat16
    spread = found[0].std()
    assert (found[1] - found[0]).square().mean().sqrt() < 0.1 * spread
    for name in ("NoreftIntervention", "NodireftIntervention", "DireftIntervention"):
        other = getattr(pyreft, name)(embed_dim=WIDTH, low_rank_dimension=RANK)
        rows = torch.randn(5, WIDTH).bfloat16()
        for layer in (getattr(other, part, None) for part in ("learned_source", "proj_layer")):
            if layer is not None:
                assert torch.equal(layer(rows), nn.functional.linear(rows.float(), layer.weight, layer.bias))


def _plain_copy(module: Any) -> Any:
    plain = loreft(act_fn=module.activation)
    plain.load_state_dict(module.state_dict())
    return plain


class _Normed(pyreft.LoreftIntervention):
    """Divides by the norm of its rows: a row of zeros would make the gradients of its weights NaN."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        rows = base / base.norm(dim=-1, keepdim=True)
        return base + (self.learned_source(rows) - self.rotate_layer(rows)) @ self.rotate_layer.weight.T


@pytest.mark.parametrize("where", [[[[2, -1], [3, 4]]], [[[2], [3, 4]]], [[[2, 2], [3, 4]]], [[[], [3]]]])
def test_own_interventions_see_real_rows_alone(where: Any) -> None:
    model, ids = make(entry(1, _Normed(embed_dim=WIDTH, low_rank_dimension=RANK))), inputs()
    model(ids, unit_locations=where, labels=ids["input_ids"])[1].loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.interventions.parameters())


@torch.no_grad()
def test_own_interventions_with_no_token_at_all() -> None:
    model, ids = make(entry(1, _Add(1.0))), inputs()
    assert torch.equal(model(ids, unit_locations=[[[], []]])[1].logits, model.model(**ids).logits)


def _replaced(change: str) -> Any:
    module: Any = loreft()
    if change == "act_fn":
        module.act_fn = nn.Tanh()
    elif change == "learned_source":
        module.learned_source = nn.Sequential(module.learned_source, nn.Tanh())
    elif change == "dropout":
        module.dropout = nn.Identity()
    elif change == "hook":
        module.register_forward_hook(lambda _module, _args, output: output * 2.0)
    else:
        module.forward = lambda base, source=None, subspaces=None: base * 2.0
    return module


@pytest.mark.parametrize("change", ["act_fn", "learned_source", "dropout", "hook", "forward"])
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_what_is_changed_on_an_intervention_takes_effect(change: str, when: str) -> None:
    ids, where = inputs(), {"sources->base": (None, LOCATIONS[:1])}
    module = _replaced(change)
    model = make(entry(1, module if when == "before" else loreft()))
    if when == "after":
        model.interventions[model.sorted_keys[0]] = module
    h = torch.randn(2, 3, WIDTH)
    R, delta = module.rotate_layer.weight.T, None
    source = module.learned_source
    if change == "act_fn":
        delta = torch.tanh(source(h)) - h @ R.T
    elif change in ("learned_source", "dropout"):
        delta = source(h) - h @ R.T
    if delta is not None:
        assert torch.allclose(module(h), h + delta @ R, atol=1e-5)
    plain = make(entry(1, lambda base, source: module(base)))
    expected = plain(ids, unit_locations=where)[1].logits
    assert torch.allclose(model(ids, unit_locations=where)[1].logits, expected, atol=1e-5)


class _Strong(pyreft.LoreftIntervention):
    def __init__(self, strength: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strength = strength


class _Kept(_Strong):
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "strength": self.strength}


def test_arguments_of_own_classes_are_saved_or_warned_of(tmp_path: Any) -> None:
    sizes = {"embed_dim": WIDTH, "low_rank_dimension": RANK}
    with pytest.warns(UserWarning, match="strength of _Strong is not saved: return it from its settings"):
        make(entry(1, _Strong(3.0, **sizes))).save(tmp_path / "lost")
    make(entry(1, _Kept(3.0, **sizes))).save(tmp_path / "kept")
    again = pyreft.ReftModel.load(tmp_path / "kept", tiny_model("llama"), classes={"_Kept": _Kept})
    assert next(iter(again.interventions.values())).strength == 3.0
    with pytest.warns(UserWarning, match="the act_fn of this LoreftIntervention was replaced, and is not saved"):
        make(entry(1, _replaced("act_fn"))).save(tmp_path / "other")


@torch.no_grad()
def test_positions_of_numpy_and_pairs() -> None:
    model, ids = make(), inputs()
    expected = model(ids, unit_locations=WHERE)[1].logits
    array = np.array(LOCATIONS)
    for form in (array, list(array), [[[np.int64(p) for p in row] for row in part] for part in LOCATIONS]):
        assert torch.equal(model(ids, unit_locations={"sources->base": (None, form)})[1].logits, expected)
    for pair in (([[[7, 7], [7, 7]]] * 2, LOCATIONS), [LOCATIONS, LOCATIONS]):  # the first are a source's
        assert torch.equal(model(ids, unit_locations={"sources->base": pair})[1].logits, expected)
    three = model(ids, unit_locations={"base": 3})[1].logits
    for form in ({"sources->base": (5, 3)}, {"sources->base": [5, 3]}, torch.tensor(3), np.int32(3), {"base": [3]}):
        assert torch.equal(model(ids, unit_locations=form)[1].logits, three)
    with pytest.raises(ValueError, match="names positions in a source and none in the base"):
        model(ids, unit_locations={"sources->base": (4, None)})


def test_a_module_that_adds_to_an_edited_output_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids: Tensor) -> Tensor:
            y = self.mlp(input_ids)
            y += input_ids
            return y

    base = Block()
    model = pyreft.ReftModel([{"component": "mlp.output", "intervention": loreft()}], base)
    x = torch.randn(2, 4, WIDTH)
    model(input_ids=x).square().sum().backward()
    assert all(p.grad is not None for p in model.interventions.parameters())
    loreft()(x.clone().requires_grad_()).add_(1.0).sum().backward()


# Methods


def test_methods_of_pyvene() -> None:
    model = make()
    assert model.sorted_keys == list(model.interventions)
    assert model.model_config is model.model.config
    assert model.get_device() == torch.device("cpu")
    assert len(model.get_trainable_parameters()) == len(list(model.interventions.parameters()))
    ids = inputs()
    model(ids, unit_locations=WHERE, labels=ids["input_ids"])[1].loss.backward()
    assert all(p.grad is not None for p in model.get_trainable_parameters())
    model.set_zero_grad()
    assert all(p.grad is None for p in model.get_trainable_parameters())
    model.set_device("cpu", set_model=False)
    model.disable_intervention_gradients()
    assert model.count_parameters() == 0
    module = model.interventions[model.sorted_keys[0]]
    assert module[0] is module  # scripts for pyvene before 0.1.7
    with pytest.raises(IndexError, match="index: expected 0"):
        module[1]


def test_dropout_with_any_activation() -> None:
    module, h = loreft(act_fn="sigmoid", dropout=0.5), torch.randn(64, WIDTH)
    dropped = (module(h) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    assert torch.equal(module.eval()(h), module(h))


def test_outputs_are_not_collected_again_in_a_recomputation() -> None:
    model, ids = make(entry(1, _Add(1.0)), entry(1, loreft()), component="mlp_output"), inputs()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model(ids, unit_locations=WHERE, labels=ids["input_ids"])[1].loss.backward()
    assert len(model.full_intervention_outputs) == 1


@torch.no_grad()
def test_any_activation_of_transformers() -> None:
    """Those that the kernels do not know run as plain operations."""
    for name in ("gelu_new", "sigmoid", "swish"):
        module = loreft(act_fn=name, dtype=torch.float64)
        h = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        R, source = module.rotate_layer.weight.T.double(), module.learned_source
        f = {"gelu_new": lambda s: nn.functional.gelu(s, approximate="tanh"), "sigmoid": torch.sigmoid}
        s = source(h)
        expected = h + (f.get(name, nn.functional.silu)(s) - h @ R.T) @ R
        assert torch.allclose(module(h), expected, atol=1e-6)
        model, ids = make(entry(1, loreft(act_fn=name))), inputs()
        where = {"sources->base": (None, LOCATIONS[:1])}
        assert not torch.equal(model(ids, unit_locations=where)[1].logits, model.model(**ids).logits)
        assert module.settings()["act_fn"] == ("silu" if name == "swish" else name)


# pyreft_compat


@torch.no_grad()
def test_compat_modes_and_names() -> None:
    for compat in (False, True):
        model = make(entry(0, loreft(dropout=0.5)), pyreft_compat=compat)
        assert model.eval() is model
        assert next(iter(model.interventions.values())).training == compat
        assert not model.model.training
        ids = inputs()
        where = {"sources->base": (None, LOCATIONS[:1])}
        one, other = (model(ids, unit_locations=where)[1].logits for _ in range(2))
        assert torch.equal(one, other) == (not compat)
        named = model.named_parameters()
        assert isinstance(named, list) == compat
    assert [name for name, _ in named] == [
        f"{model.sorted_keys[0]}.{name}" for name, _ in next(iter(model.interventions.values())).named_parameters()
    ]


@torch.no_grad()
def test_compat_an_int_position_sticks() -> None:
    reference = make()
    config = pyreft.ReftConfig(representations=[entry(0), entry(2)])
    model = pyreft.get_reft_model(tiny_model("llama"), config, pyreft_compat=True)
    model.interventions.load_state_dict(reference.interventions.state_dict())
    ids = inputs()
    expected = reference(ids, unit_locations=WHERE)[1].logits
    assert torch.allclose(model(ids, unit_locations=WHERE)[1].logits, expected, atol=1e-5)
    model(ids, unit_locations={"base": 3})
    spoilt = model(ids, unit_locations=WHERE)[1].logits
    assert torch.allclose(spoilt[0], expected[0], atol=1e-5)
    assert not torch.allclose(spoilt[1], expected[1], atol=1e-3)
    reference(ids, unit_locations={"base": 3})
    assert torch.equal(reference(ids, unit_locations=WHERE)[1].logits, expected)


@torch.no_grad()
def test_compat_generation_edits_decoded_tokens_alone() -> None:
    reference = make()
    model = make(pyreft_compat=True)
    model.interventions.load_state_dict(copy.deepcopy(reference.interventions.state_dict()))
    ids = inputs()
    options = {"max_new_tokens": 5, "do_sample": False}
    default = model.generate(ids, **options)[1]
    assert torch.equal(default, reference.generate(ids, intervene_on_prompt=False, **options)[1])
    prompt = reference.generate(ids, **options)[1]
    assert torch.equal(model.generate(ids, intervene_on_prompt=True, **options)[1], prompt)
    assert not torch.equal(default, prompt)
