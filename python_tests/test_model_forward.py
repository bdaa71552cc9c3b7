"""What a ReftModel's forward computes, against the same edits made by hand, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_edits import edited_by_hand, ends, strengthen
from tiny_models import ARCHITECTURES, DECODERS, LAYERS, WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention, NodireftIntervention
from reft_kernels.model import ReftModel, get_reft_model

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
}


def block(model: nn.Module, architecture: str, layer: int) -> nn.Module:
    return model.get_submodule(f"{BLOCKS.get(architecture, 'model.layers')}.{layer}")


def make(model: Any, **settings: Any) -> ReftModel:
    reft_model = get_reft_model(model, ReftConfig(**{"method": "loreft", "layers": "all", "rank": 2, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_edits_every_architecture(architecture: str, tied: bool) -> None:
    model = tiny_model(architecture)
    reft_model = make(model, positions="f2+l3", tied=tied)
    batch = random_batch([9, 4, 6])
    heads, tails = ends(batch["attention_mask"], 2, 3)
    modules = list(reft_model.interventions.values())
    assert len(modules) == (LAYERS if tied else 2 * LAYERS)
    edits = []
    for layer in range(LAYERS):
        prefix, suffix = modules[layer], modules[layer if tied else LAYERS + layer]
        edits += [(block(model, architecture, layer), "output", prefix, heads)]
        edits += [(block(model, architecture, layer), "output", suffix, tails)]
    with edited_by_hand(edits):
        wanted = model(**batch).logits
    found = reft_model(**batch).logits
    close(found, wanted)
    assert (wanted - model(**batch).logits).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("component", ["block_input", "mlp_output", "mlp_input", "attention_output", "attention_input"])
def test_edits_every_component(architecture: str, component: str) -> None:
    model = tiny_model(architecture)
    reft_model = make(model, positions="f2+l3", component=component, layers=[1])
    batch = random_batch([9, 6])
    heads, tails = ends(batch["attention_mask"], 2, 3)
    inside = {
        "llama": {"mlp": "mlp", "attention": "self_attn"},
        "gpt2": {"mlp": "mlp", "attention": "attn"},
        "bert": {
            "mlp_output": "output.dense",
            "mlp_input": "intermediate",
            "attention_output": "attention.output.dense",
            "attention_input": "attention.self",
        },
    }[architecture]
    name, side = component.rsplit("_", 1)
    path = "" if name == "block" else inside.get(component) or inside[name]
    module = block(model, architecture, 1).get_submodule(path)
    (intervention,) = reft_model.interventions.values()
    both = [head + tail for head, tail in zip(heads, tails, strict=True)]
    with edited_by_hand([(module, side, intervention, both)]):
        wanted = model(**batch).logits
    close(reft_model(**batch).logits, wanted)
    assert (wanted - model(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("path", "width"),
    [
        ("model.layers[2].output", WIDTH),
        ("model.layers[0].mlp.act_fn.output", 24),
        ("model.layers[1].mlp.down_proj.input", 24),
        ("model.layers.1.self_attn.q_proj.output", WIDTH),
        ("model.embed_tokens.output", WIDTH),
        ("model.norm.input", WIDTH),
    ],
)
def test_edits_any_module(path: str, width: int) -> None:
    model = tiny_model("llama")
    intervention = NodireftIntervention(embed_dim=width, low_rank_dimension=3)
    strengthen(intervention)
    reft_model = get_reft_model(model, ReftConfig({"component": path, "intervention": intervention}))
    (key,) = reft_model.interventions
    assert key == f"comp_{path.replace('.', '_')}_unit_pos_nunit_1#0"
    batch = random_batch([5, 5])
    *steps, side = path.replace("[", ".").replace("]", "").split(".")
    module = model.get_submodule(".".join(steps))
    with edited_by_hand([(module, side, intervention, [[1, 3], [0, 4]])]):
        wanted = model(**batch).logits
    _, found = reft_model(batch, unit_locations={"sources->base": (None, [[[1, 3], [0, 4]]])})
    close(found.logits, wanted)
    assert (wanted - model(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", DECODERS)
def test_padding_on_either_side_edits_the_same_tokens(architecture: str) -> None:
    """A row that is padded, on the left or on the right, gives what it gives alone."""
    model = tiny_model(architecture)
    reft_model = make(model, positions="f2+l2", tied=False)
    lengths = [7, 3, 5]
    right = random_batch(lengths)
    left = random_batch(lengths, side="left")
    for row, n in enumerate(lengths):
        left["input_ids"][row, 7 - n :] = right["input_ids"][row, :n]
    places = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = [reft_model(input_ids=right["input_ids"][row : row + 1, :n]).logits[0] for row, n in enumerate(lengths)]
    # GPT-NeoX and the others take rotary positions from the caller, as `generate` gives them.
    from_left = reft_model(**left, position_ids=places).logits
    from_right = reft_model(**right).logits
    for row, n in enumerate(lengths):
        close(from_right[row, :n], alone[row])
        close(from_left[row, 7 - n :], alone[row])


def test_labels_end_the_prompt() -> None:
    """With labels, the suffix is the end of the prompt and not of the answer; the loss is the base model's own."""
    model = tiny_model("llama")
    reft_model = make(model, positions="f1+l2", layers=[0, 1])
    batch = random_batch([8, 6])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :5] = -100
    labels[1, :4] = -100
    edits: list[Any] = [
        (block(model, "llama", layer), "output", module, [[0, 3, 4], [0, 2, 3]])
        for layer, module in enumerate(reft_model.interventions.values())
    ]
    with edited_by_hand(edits):
        wanted = model(**batch, labels=labels)
    found = reft_model(**batch, labels=labels)
    close(found.logits, wanted.logits)
    close(found.loss, wanted.loss)
    halved = reft_model(**batch, labels=labels, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum()))
    close(halved.loss, wanted.loss / 2)


def test_labels_of_an_encoder_do_not_end_the_prompt() -> None:
    import transformers

    config = tiny_model("bert").config
    model = transformers.BertForTokenClassification(config).eval()
    reft_model = make(model, positions="f1+l1", layers=[0])
    batch = random_batch([6, 6])
    labels = torch.zeros_like(batch["input_ids"])
    labels[:, :2] = -100
    close(reft_model(**batch, labels=labels).logits, reft_model(**batch).logits)


FORMS = {
    "pyreft": lambda table: {"sources->base": (None, table.tolist())},
    "base": lambda table: {"base": table.tolist()},
    "list": lambda table: table.tolist(),
    "tensor": lambda table: table,
    "int32": lambda table: {"sources->base": (None, table.int())},
}


@pytest.mark.parametrize("form", [*FORMS, "collator"])
def test_forms_of_unit_locations(form: str) -> None:
    model = tiny_model("llama")
    reft_model = make(model, positions="f1+l1", tied=False)
    batch = random_batch([6, 6])
    table = torch.stack([torch.stack([torch.randperm(3) for _ in range(2)]) + 3 * (i % 2) for i in range(2 * LAYERS)])
    table[::2, :, 0] = -1
    edits: list[Any] = [
        (block(model, "llama", i % LAYERS), "output", module, table[i].tolist())
        for i, module in enumerate(reft_model.interventions.values())
    ]
    with edited_by_hand(edits):
        wanted = model(**batch).logits
    if form == "collator":
        found = reft_model(**batch, intervention_locations=table.transpose(0, 1).contiguous())
    else:
        original, found = reft_model(batch, unit_locations=FORMS[form](table))
        assert original is None
    close(found.logits, wanted)


def test_same_locations_for_all() -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    batch = random_batch([6, 6])
    table = [[[0, 4]] * 2] * LAYERS
    wanted = reft_model(**batch, unit_locations=table).logits
    for form in ([0, 4], {"sources->base": (None, [0, 4])}, torch.tensor([4, 0]), [4, 4, 0, 4]):
        close(reft_model(**batch, unit_locations=form).logits, wanted)
    one = reft_model(**batch, unit_locations=[[[4]] * 2] * LAYERS).logits
    close(reft_model(**batch, unit_locations={"sources->base": 4}).logits, one)
    close(reft_model(**batch, positions="l1").logits, reft_model(**batch, unit_locations=5).logits)
    # A flat call leaves nothing behind for the next, nested one (in pyvene it does).
    close(reft_model(**batch, unit_locations=table).logits, wanted)


def test_every_token() -> None:
    model = tiny_model("llama")
    reft_model = make(model)
    batch = random_batch([6, 4])
    edits: list[Any] = [
        (block(model, "llama", i), "output", module, None) for i, module in enumerate(reft_model.interventions.values())
    ]
    with edited_by_hand(edits):
        wanted = model(**batch).logits
    for keywords in ({}, {"positions": "all"}, {"unit_locations": {"sources->base": (None, None)}}):
        close(reft_model(**batch, **keywords).logits, wanted)
    with edited_by_hand([(e[0], e[1], e[2], [[1], [2]] if i else None) for i, e in enumerate(edits)]):
        wanted = model(**batch).logits
    nested = [None, [[1], [2]], [[1], [2]]]
    close(reft_model(**batch, unit_locations=nested).logits, wanted)


@pytest.mark.parametrize("flat", [True, False])
def test_a_token_named_twice_is_edited_one_after_the_other(flat: bool) -> None:
    model = tiny_model("llama")
    modules = [LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(3)]
    for module in modules:
        strengthen(module)
    reft_model = get_reft_model(model, ReftConfig([{"layer": 1, "intervention": module} for module in modules])).eval()
    assert list(reft_model.interventions) == [f"layer_1_comp_block_output_unit_pos_nunit_1#{k}" for k in range(3)]
    batch = random_batch([6, 6])
    table = [[[2, 3]] * 2] * 3 if flat else [[[0, 1], [2]], [[3], [2, 4]], [[1, 5], [0]]]
    with edited_by_hand([(block(model, "llama", 1), "output", m, t) for m, t in zip(modules, table, strict=True)]):
        wanted = model(**batch).logits
    close(reft_model(**batch, unit_locations=[2, 3] if flat else table).logits, wanted)
    one = [[[2], [2]]] * 3
    with edited_by_hand([(block(model, "llama", 1), "output", m, t) for m, t in zip(modules, one, strict=True)]):
        wanted = model(**batch).logits
    close(reft_model(**batch, unit_locations=torch.tensor([2])).logits, wanted)
    close(reft_model(**batch, unit_locations=torch.tensor(one)).logits, wanted)


def test_two_interventions_of_one_place_both_learn_from_a_collated_batch() -> None:
    modules = [LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(2)]
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig([{"layer": 1, "intervention": m} for m in modules]))
    batch = random_batch([6, 6])
    table = torch.tensor([[[2], [2]]] * 2)  # [B, I, P]
    reft_model(**batch, intervention_locations=table, labels=batch["input_ids"]).loss.backward()
    for module in modules:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_a_tensor_with_a_prefix_and_a_suffix_is_one_edit() -> None:
    """The interventions' own positions say that they name no token in common."""
    reft_model = make(tiny_model("llama"), positions="f2+l2", tied=False)
    batch = random_batch([8, 8])
    count = len(reft_model.interventions) // 2
    table = torch.tensor([[[0, 1]] * 2] * count + [[[6, 7]] * 2] * count)
    plan = reft_model._planner.of_forward(batch, table, None, None, None, True)
    assert plan.steps is not None
    assert all(len(steps) == 1 and steps[0].members == (0, 1) for steps in plan.steps)
    close(reft_model(**batch, unit_locations=table).logits, reft_model(**batch).logits)


def test_overlapping_positions_of_one_layer() -> None:
    """Strings that name a token twice edit it twice, in order, and the whole sequence between them as well."""
    model = tiny_model("llama")
    modules = [LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(4)]
    for module in modules:
        strengthen(module)
    spans = ["f2+l1", "l2", "all", "f1"]
    config = ReftConfig([{"layer": 0, "intervention": m, "positions": p} for m, p in zip(modules, spans, strict=True)])
    reft_model = get_reft_model(model, config).eval()
    batch = random_batch([6, 6])
    rows: list[Any] = [[[0, 1, 5]] * 2, [[4, 5]] * 2, None, [[0]] * 2]
    with edited_by_hand([(block(model, "llama", 0), "output", m, r) for m, r in zip(modules, rows, strict=True)]):
        wanted = model(**batch).logits
    close(reft_model(**batch).logits, wanted)


def test_positions_of_the_call_keep_the_ends_untied() -> None:
    reft_model = make(tiny_model("llama"), positions="f1+l1", tied=False)
    batch = random_batch([8, 8])
    heads, tails = ends(batch["attention_mask"], 2, 3)
    table = [[[*row, -1] for row in heads]] * LAYERS + [tails] * LAYERS
    close(reft_model(**batch, positions="f2+l3").logits, reft_model(**batch, unit_locations=table).logits)


def test_embeddings_and_a_missing_mask() -> None:
    model = tiny_model("llama")
    reft_model = make(model, positions="f2+l2")
    batch = random_batch([6, 6])
    wanted = reft_model(**batch).logits
    close(reft_model(input_ids=batch["input_ids"]).logits, wanted)
    close(reft_model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"])).logits, wanted)


def test_a_cached_prefix_shifts_the_positions() -> None:
    """Two calls with a cache give what one call gives; the mask covers both parts."""
    model = tiny_model("llama")
    reft_model = make(model, positions="f2+l3")
    batch = random_batch([8, 8])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = reft_model(input_ids=ids).logits
    # The whole prompt's positions are 0, 1, 5, 6 and 7; the first part holds two of them.
    modules = list(reft_model.interventions.values())
    edits: Any = [(block(model, "llama", i), "output", m, [[0, 1]] * 2) for i, m in enumerate(modules)]
    with edited_by_hand(edits):
        past = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    rest = reft_model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=past).logits
    close(rest, wanted[:, 5:])


def test_original_output() -> None:
    model = tiny_model("gpt2")
    reft_model = make(model, positions="l1")
    batch = random_batch([5, 5])
    original, edited = reft_model(batch, output_original_output=True)
    assert original.logits.equal(model(**batch).logits)
    close(edited.logits, reft_model(**batch).logits)
    assert reft_model(**batch, return_dict=False)[0].equal(reft_model(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    reft_model = make(model, positions="f2+l2", tied=False)
    batch = random_batch([7, 7])
    heads, tails = ends(batch["attention_mask"], 2, 2)
    modules = list(reft_model.interventions.values())
    edits: list[Any] = []
    for i in range(LAYERS):
        edits += [(block(model, "llama", i), "output", modules[i], heads)]
        edits += [(block(model, "llama", i), "output", modules[LAYERS + i], tails)]
    with edited_by_hand(edits):
        wanted = model(**batch).logits
    found = reft_model(**batch).logits
    assert found.dtype == dtype
    plain = model(**batch).logits
    assert (found - wanted).norm() < 0.05 * (wanted - plain).norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer": 3}, "layer 3 does not exist: LlamaForCausalLM has 3 layers"),
        ({"layer": -1}, "layer -1 does not exist"),
        ({"layer": 0, "component": "mlp_act"}, "unknown component 'mlp_act': expected one of block_output"),
        ({"component": "model.layers[3].output"}, r"'3' in LlamaForCausalLM.model.layers \(ModuleList\)"),
        (
            {"component": "model.layers[0].attn.output"},
            r"no module 'attn' in .*model.layers\[0\] .*self_attn",
        ),
        ({"component": "model.layers[0].mlp"}, "must end in .output or .input"),
        ({"component": ".output"}, "cannot read the step ''"),
        ({"component": "model.layers[x].output"}, r"cannot read the step 'layers\[x\]'"),
    ],
)
def test_places_that_do_not_exist(config: dict[str, Any], message: str) -> None:
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    with pytest.raises(ValueError, match=message):
        get_reft_model(tiny_model("llama"), ReftConfig({**config, "intervention": intervention}))


def test_widths_that_do_not_fit() -> None:
    model = tiny_model("llama")
    narrow = LoreftIntervention(embed_dim=8, low_rank_dimension=2)
    with pytest.raises(ValueError, match=r"layer_1.*#0: the output of model.layers\[1\] has 16 values.*embed_dim is 8"):
        get_reft_model(model, ReftConfig({"layer": 1, "intervention": narrow}))
    # An activation says nothing of its width before it is called.
    reft_model = get_reft_model(
        model, ReftConfig({"component": "model.layers[0].mlp.act_fn.output", "intervention": narrow})
    )
    with pytest.raises(ValueError, match=r"model.layers\[0\].mlp.act_fn has 24 values a row.*embed_dim is 8"):
        reft_model(**random_batch([3]))


def test_models_without_a_list_of_layers() -> None:
    import transformers

    t5 = transformers.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(t5).eval()
    with pytest.raises(ValueError, match="cannot tell which modules of T5ForConditionalGeneration are its layers"):
        make(model)
    intervention = LoreftIntervention(embed_dim=16, low_rank_dimension=2)
    reft_model = get_reft_model(
        model, ReftConfig({"component": "encoder.block[1].output", "intervention": intervention})
    )
    batch = {"input_ids": torch.randint(3, 20, (2, 5)), "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with edited_by_hand([(model.encoder.block[1], "output", intervention, [[1], [4]])]):
        wanted = model(**batch).logits
    close(reft_model(**batch, unit_locations=[[[1], [4]]]).logits, wanted)
    decoder = {"component": "decoder.block[1].output", "intervention": intervention, "positions": "l1"}
    with pytest.raises(ValueError, match="positions are those of the encoder's input, and this edits the decoder"):
        get_reft_model(model, ReftConfig(decoder))(**batch)


@pytest.mark.parametrize(
    ("error", "keywords", "message"),
    [
        (ValueError, {"unit_locations": [[[1], [1]]]}, "expected 3 interventions, got 1"),
        (ValueError, {"unit_locations": [[[1]]] * 3}, r"expected 2 rows in \[0\], got 1"),
        (ValueError, {"unit_locations": 5}, "position 5, but the input has 5 tokens"),
        (ValueError, {"unit_locations": 1, "positions": "f1"}, "not both"),
        (ValueError, {"unit_locations": 1, "intervention_locations": torch.zeros(2, 3, 1).long()}, "not both"),
        (ValueError, {"intervention_locations": torch.zeros(3, 2, 1).long()}, r"\[2, 3, P\], got \[3, 2, 1\]"),
        (ValueError, {"intervention_locations": [[1]]}, "got list"),
        (ValueError, {"positions": "7"}, "positions must be"),
        (TypeError, {"positions": 7}, "positions must be a string"),
        (ValueError, {"sources": [1]}, "sources must be None"),
        (ValueError, {"positions": "f1", "attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask \[B, S\]"),
    ],
)
def test_calls_that_make_no_sense(error: type[Exception], keywords: dict[str, Any], message: str) -> None:
    reft_model = make(tiny_model("llama"))
    ids = random_batch([5, 5])["input_ids"]
    with pytest.raises(error, match=message):
        reft_model(input_ids=ids, **keywords)


def test_base_that_makes_no_sense() -> None:
    reft_model = make(tiny_model("llama"), positions="f1")
    ids = random_batch([5])["input_ids"]
    with pytest.raises(TypeError, match=r"base must be a dict.*got Tensor"):
        reft_model(ids)
    with pytest.raises(ValueError, match="input_ids is given twice"):
        reft_model({"input_ids": ids}, input_ids=ids)
    with pytest.raises(TypeError, match="reft_config must be a ReftConfig"):
        get_reft_model(tiny_model("llama"), "loreft")  # type: ignore[arg-type]


def test_hidden_states_of_another_length() -> None:
    """A module that does not see the input's tokens is named, rather than edited at the wrong ones."""
    model = tiny_model("bert")
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    reft_model = get_reft_model(
        model, ReftConfig({"component": "bert.pooler.output", "intervention": intervention, "positions": "f1"})
    )
    with pytest.raises(ValueError, match=r"bert.pooler of shape \[B, S, d\] with B = 2, got \[2, 16\]"):
        reft_model(**random_batch([5, 5]))
    unlimited = get_reft_model(model, ReftConfig({"component": "bert.pooler.output", "intervention": intervention}))
    assert unlimited(**random_batch([5, 5])).logits.shape == (2, 2)
