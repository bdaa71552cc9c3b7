"""FrozenCache: the same loss and gradients from the tokens after the first edited one alone; what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from frozen_support import (
    LENGTHS,
    SETTINGS,
    cached,
    largest_difference,
    make_model,
    make_rows,
    mean_loss,
    uncached,
)
from tiny_models import DECODERS, VOCABULARY, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import get_reft_model
from reft_kernels.training import FrozenCache, SuffixCollator, SupervisedCollator
from reft_kernels.training import frozen_cache as module

collate = SuffixCollator(SupervisedCollator())


def assert_the_same(model: Any, items: list[dict[str, Tensor]], tolerance: float = 1e-12) -> FrozenCache:
    """Computed, then from what was kept."""
    wanted = uncached(model, items)
    assert max(float(g.abs().max()) for g in wanted[1]) > 1e-3
    cache = FrozenCache(model)
    for _ in range(2):
        loss, grads = cached(model, cache, collate(items))
        assert abs(loss - wanted[0]) <= tolerance * abs(wanted[0])
        assert largest_difference(grads, wanted[1]) <= 10 * tolerance
    assert (cache.stats.misses, cache.stats.hits) == (len(items), len(items))
    return cache


@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output", "attention_output"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_architectures(architecture: str, component: str) -> None:
    # The masks of eager attention, which softcap needs, are only right in float32.
    dtype, tolerance = (torch.float32, 1e-6) if architecture == "gemma2" else (torch.float64, 1e-13)
    model = make_model(architecture, dtype, component=component)
    cache = assert_the_same(model, make_rows(model), tolerance)
    assert cache.frozen_blocks == (2 if component == "block_output" else 1)


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8,
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "no position_ids": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 3, "n_head": 2}),
    "learned positions with an offset": ("OPT", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "word_embed_proj_dim": 16, "dropout": 0.0, "max_position_embeddings": 64,
    }),
    "alibi": ("Falcon", {**_SMALL, "alibi": True}),
    "experts": ("Mixtral", {**_SMALL, "num_local_experts": 4}),
    "two kinds of windows": ("Gemma3Text", {**_SMALL, "head_dim": 8, "sliding_window": 4}),
    "chunks": ("Llama4Text", {**_SMALL, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2}),
    "keys wider than values": ("DeepseekV3", {**_SMALL, **_LATENT}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_attention(kind: str) -> None:
    name, settings = OTHERS[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    base = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    config = ReftConfig(method="loreft", layers="all", rank=2, positions="l2")
    model = get_reft_model(base.eval(), config).train()
    assert_the_same(model, make_rows(model), 1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"layers": "all"},
        {"layers": [2]},
        {"layers": [0], "component": "block_input"},
        {"layers": [0], "component": "mlp_output"},
        {"layers": "all", "positions": "f2+l2"},
        {"layers": [2], "positions": "f1+l2", "tied": False},
        {"layers": "all", "positions": "f1+l2", "tied": False},
        {"method": "direft"},
        {"method": "nodireft", "act_fn": "relu"},
        {"method": "consreft"},
        {"rank": 5, "orthogonality": "polar"},
    ],
    ids=str,
)
def test_configs(config: dict[str, Any]) -> None:
    model = make_model(**config)
    cache = assert_the_same(model, make_rows(model, config.get("positions", "l2")))
    stats = cache.stats
    tokens = sum(map(sum, LENGTHS))
    assert stats.block_tokens == 2 * 3 * tokens
    if "f" in config.get("positions", ""):
        # t0 is 0 but for the prompt of one token, which has no edits.
        assert stats.frozen_block_tokens == 2 * (cache.frozen_blocks * tokens)
    elif config.get("layers") == "all":
        after = sum(min(2, prompt // 2) + output for prompt, output in LENGTHS) + 1
        assert stats.frozen_block_tokens == 2 * (3 * tokens - 2 * after)
        assert 0.5 < stats.saved_fraction < 0.9


def test_interventions_at_paths_and_several_at_a_layer() -> None:
    base = tiny_model("llama").double()

    def edit(place: dict[str, Any]) -> dict[str, Any]:
        intervention = LoreftIntervention(embed_dim=16, low_rank_dimension=2)
        return {**place, "low_rank_dimension": 2, "intervention": intervention, "positions": "l2"}

    for places, first in (
        ([{"component": "model.layers[2].mlp.output"}, {"component": "lm_head.input"}], 0),
        ([{"component": "model.layers[2].output"}, {"layer": 2, "component": "mlp_output"}], 2),
        ([{"component": "model.embed_tokens.output"}, {"layer": 2, "component": "block_output"}], 0),
        ([{"layer": 1, "component": "block_output"}, {"layer": 2, "component": "block_input"}], 2),
    ):
        model = get_reft_model(base, ReftConfig([edit(place) for place in places])).train()
        model.interventions.double()
        assert assert_the_same(model, make_rows(model)).frozen_blocks == first
        model.remove_hooks()


def test_own_interventions_and_subspaces() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, dtype=torch.float64))

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            return base + self.weight[subspaces].sum(1, keepdim=True)

    base = tiny_model("llama").double()
    config = ReftConfig([{"layer": 1, "component": "block_output", "intervention": Shift(), "positions": "l2"}])
    model = get_reft_model(base, config).train()
    items = [{**row, "subspaces": [[k % 4]]} for k, row in enumerate(make_rows(model))]
    assert_the_same(model, items)


def test_rows_without_edits_and_edits_after_the_first_label() -> None:
    model = make_model(layers="all")
    items = make_rows(model)
    items[0]["intervention_locations"] = torch.full((3, 2), -1)
    items[2]["intervention_locations"] = torch.tensor([[15, 14]] * 3)  # of a prompt of 12 and an output of 6
    batch = collate(items)
    assert batch["frozen_rows"].starts == [8, 3, 11, 0, 2]
    assert_the_same(model, items)


def test_positions_of_a_tensor_per_layer() -> None:
    model = make_model(layers="all", positions=None)
    items = make_rows(model)
    items[2]["intervention_locations"] = torch.tensor([[11, -1], [7, 9], [10, 9]])
    assert collate(items)["frozen_rows"].starts[2] == 7
    assert_the_same(model, items)


def test_the_batch_of_a_suffix() -> None:
    model = make_model()
    items = make_rows(model, lengths=((5, 2), (3, 3)))
    whole, batch = SupervisedCollator(0)(items), collate(items)
    assert batch["frozen_rows"].starts == [3, 2]
    assert torch.equal(batch["input_ids"], torch.stack([whole["input_ids"][0, 3:7], whole["input_ids"][1, 2:6]]))
    assert batch["labels"].tolist() == [[-100, -100, *items[0]["labels"][5:]], [-100, *items[1]["labels"][3:]]]
    assert batch["position_ids"].tolist() == [[3, 4, 5, 6], [2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0, *[1] * 6]]
    assert batch["intervention_locations"].tolist() == [[[0, 1]] * 2, [[0, -1]] * 2]
    without = SuffixCollator(lambda rows: {"input_ids": whole["input_ids"]})
    assert without(items).keys() == {"input_ids"}


def test_a_cached_batch_runs_only_what_changes() -> None:
    model = make_model(layers="all")
    items = make_rows(model)
    cache = FrozenCache(model)
    cached(model, cache, collate(items))
    seen: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda m, a, output: seen.append(output.shape[1]))
        for block in model.model.model.layers
    ]
    batch = collate(items)
    cached(model, cache, batch)
    assert seen == [batch["input_ids"].shape[1]] * 2 == [8, 8]
    for handle in handles:
        handle.remove()
    ids = random_batch([4])
    assert all("forward" not in vars(block) for block in model.model.model.layers)
    torch.testing.assert_close(model.model(**ids).logits, tiny_model("llama").double()(**ids).logits)


def test_dropout_of_the_edits_is_drawn_and_the_first_check_draws_nothing() -> None:
    model = make_model(dropout=0.5)
    items = make_rows(model)
    cache = FrozenCache(model)
    state = torch.get_rng_state()
    losses = {float(cached(model, cache, collate(items))[0]) for _ in range(4)}
    assert len(losses) == 4
    torch.set_rng_state(state)
    again = FrozenCache(model, verify=False)
    assert float(cached(model, again, collate(items))[0]) in losses
    assert all(inner.training for inner in model.interventions.modules())
    model.eval()
    assert cached(model, cache, collate(items))[0] == pytest.approx(float(uncached(model, items)[0]), rel=1e-12)


def test_autocast_has_entries_of_its_own() -> None:
    model = make_model(dtype=torch.float32)
    items = make_rows(model)
    cache = FrozenCache(model)
    cached(model, cache, collate(items))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = float(uncached(model, items)[0])
        found = [float(cached(model, cache, collate(items))[0]) for _ in range(2)]
    assert found == pytest.approx([wanted] * 2, rel=1e-2)
    assert (cache.stats.misses, cache.stats.hits) == (10, 5)


def test_weights_of_the_base_model_that_change_are_noticed() -> None:
    model = make_model()
    items = make_rows(model)
    cache = FrozenCache(model)
    cached(model, cache, collate(items))
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight[3, 5] += 1.0
    wanted = uncached(model, items)
    loss, grads = cached(model, cache, collate(items))
    assert float(loss) == pytest.approx(float(wanted[0]), rel=1e-12)
    assert largest_difference(grads, wanted[1]) < 1e-12
    assert (cache.stats.misses, cache.stats.hits) == (10, 0)


def later(starts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda labels, locations, lengths: starts(labels, locations, lengths) + 1


def off_by_one(batch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda given: (made := batch(given)) | {"position_ids": made["position_ids"] + 1}


def without_mask(batch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda given: (made := batch(given)) | {"attention_mask": torch.ones_like(made["attention_mask"])}


def shifted_keys(join: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (made := join(*args))._replace(keys=made.keys.roll(1, dims=3))


@pytest.mark.parametrize(
    ("place", "name", "mutate"),
    [
        ("frozen_rows", "_starts", later),
        ("frozen_rows", "suffix_batch", off_by_one),
        ("frozen_rows", "suffix_batch", without_mask),
        ("frozen_cache", "join_entries", shifted_keys),
    ],
    ids=["t0", "position_ids", "mask", "keys"],
)
def test_a_fault_is_found_at_the_first_batch(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, mutate: Callable[..., Any]
) -> None:
    model = make_model()
    items = make_rows(model)
    wanted = uncached(model, items)
    where = __import__(f"reft_kernels.training.{place}", fromlist=[name])
    monkeypatch.setattr(where, name, mutate(getattr(where, name)))
    with pytest.raises(RuntimeError, match=r"computes other hidden states from kept keys and values .* differ by"):
        cached(model, FrozenCache(model), collate(items))
    loss, _ = cached(model, FrozenCache(model, verify=False), collate(items))
    assert abs(loss - wanted[0]) > 1e-4


def refused(base: Any, **config: Any) -> str:
    settings = {"method": "loreft", "layers": [0], "rank": 2, "positions": "l2", **config}
    model = get_reft_model(base, ReftConfig(**settings))
    with pytest.raises(ValueError, match="frozen_cache") as caught:
        FrozenCache(model)
    return str(caught.value)


def test_models_without_a_frozen_part() -> None:
    llama = tiny_model("llama")
    assert "edits every token (positions='all')" in refused(llama, positions="all")
    assert "BertForSequenceClassification is no causal language model" in refused(tiny_model("bert"))
    assert "transformer.drop.p = 0.1 of the base model draws other numbers" in refused(tiny_model("gpt2"))
    assert "attention_dropout = 0.2" in refused(tiny_model("llama", attention_dropout=0.2))
    longer = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "(dynamic)" in refused(tiny_model("llama", rope_scaling=longer))
    with pytest.raises(ValueError, match="nothing is edited"):
        FrozenCache(get_reft_model(llama, ReftConfig([])))
    with pytest.raises(TypeError, match="reft_model must be a ReftModel, got Llama"):
        FrozenCache(llama)


def test_trained_base_parameters() -> None:
    model = make_model()
    model.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight of LlamaModel is trained: freeze it"):
        FrozenCache(model)
    model.disable_model_gradients()
    model.model.lm_head.weight.requires_grad_()  # comes after everything that is kept
    model.train()
    assert_the_same(model, make_rows(model))


def test_other_kinds_of_models() -> None:
    small = {"vocab_size": 50, "d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, dropout_rate=0.0))
    assert "encoder-decoder" in refused(t5, layers=None, **path("encoder.block[1].output"))
    mamba = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert "is not keys and values alone" in refused(transformers.MambaForCausalLM(mamba))
    reader = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    assert "BertLMHeadModel is not causal: its last token changes" in refused(transformers.BertLMHeadModel(reader))


def path(component: str) -> dict[str, Any]:
    item = {"component": component, "low_rank_dimension": 2, "positions": "l2"}
    made = {**item, "intervention": LoreftIntervention(embed_dim=16, low_rank_dimension=2)}
    return {"representations": [made], "method": None, "rank": None, "positions": None}


def test_hooks_and_checkpointing() -> None:
    model = make_model()
    items = make_rows(model)
    handle = model.model.model.layers[1].self_attn.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"forward hooks on layers\.1\.self_attn of Llama.* remove them"):
        FrozenCache(model)
    handle.remove()
    cache = FrozenCache(model)
    handle = model.model.model.layers[1].register_forward_pre_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"forward hooks on layers\.1"):
        cache.look_up(collate(items))
    handle.remove()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops the keys and values"):
        cache.look_up(collate(items))


def test_batches_that_are_refused() -> None:
    model = make_model()
    items = make_rows(model)
    whole = SupervisedCollator()(items)

    def made(**changes: Any) -> Any:
        batch = {name: value for name, value in {**whole, **changes}.items() if value is not None}
        return SuffixCollator(lambda rows: batch)

    with pytest.raises(ValueError, match=r"needs intervention_locations .* the batch has input_ids, labels"):
        made(intervention_locations=None)(items)
    with pytest.raises(ValueError, match="'token_type_ids' of a batch"):
        made(token_type_ids=whole["input_ids"])(items)
    with pytest.raises(ValueError, match="padded on the right"):
        made(attention_mask=whole["attention_mask"].flip(1))(items)
    with pytest.raises(ValueError, match="labels must be -100 where attention_mask is 0"):
        made(labels=whole["input_ids"])(items)
    assert made(attention_mask=None)(items)["frozen_rows"].tokens[3].shape == (18,)


def test_the_kept_states_are_left_alone() -> None:
    """An edit may be written into the hidden states that a batch is given."""
    model = make_model(layers=[1], positions="l2")
    items = make_rows(model)
    cache = FrozenCache(model)
    first = cached(model, cache, collate(items))
    kept = [t.clone() for entry in cache._store._entries.values() for t in entry]
    for _ in range(2):
        again = cached(model, cache, collate(items))
        assert torch.equal(again[0], first[0])
        assert all(map(torch.equal, again[1], first[1]))
    assert all(map(torch.equal, kept, [t for entry in cache._store._entries.values() for t in entry]))
    with torch.no_grad(), cache.apply(collate(items)) as inputs:
        assert torch.isfinite(mean_loss(model(**inputs), collate(items)["labels"]))


def test_settings_name_models_that_exist() -> None:
    assert set(SETTINGS) <= set(DECODERS)
    assert module._TOLERANCE[torch.float64] < module._TOLERANCE[torch.float32]
