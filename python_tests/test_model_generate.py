"""Generation: the prompt edited once, against greedy and beam search by hand with full passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hand_edits import edited_by_hand, ends, greedy_by_hand, strengthen
from tiny_models import DECODERS, LAYERS, VOCABULARY, WIDTH, random_batch, tiny_model
from torch import Tensor, nn

import reft_kernels.hooks
from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model

NEW = 5
TRANSFORMERS = int(transformers.__version__.split(".")[0])


def make(architecture: str = "llama", **settings: Any) -> ReftModel:
    model = tiny_model(architecture)
    model.generation_config.eos_token_id = None
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", "tied": False}
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


def prompt_edits(reft_model: ReftModel, mask: Tensor, repeats: int = 1) -> list[Any]:
    heads, tails = ends(mask.repeat_interleave(repeats, 0), 2, 2)
    modules = list(reft_model.interventions.values())
    return [
        (module, "output", modules[i + part * LAYERS], rows)
        for i, module in enumerate(blocks(reft_model.model))
        for part, rows in ((0, heads), (1, tails))
    ]


@pytest.fixture
def edits_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each edit that is made."""
    made: list[int] = []
    edit_rows = reft_kernels.hooks.edit_rows

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(len(args[0]))
        return edit_rows(*args, **kwargs)

    monkeypatch.setattr(reft_kernels.hooks, "edit_rows", counted)
    return made


@pytest.mark.parametrize("architecture", DECODERS)
def test_edits_the_prompt_once(architecture: str, edits_made: list[int]) -> None:
    reft_model = make(architecture)
    batch = random_batch([7, 4, 5], side="left")
    wanted = greedy_by_hand(reft_model.model, batch, NEW, prompt_edits(reft_model, batch["attention_mask"]))
    plain = reft_model.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    edits_made.clear()
    found = reft_model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert edits_made == [2] * LAYERS  # prefix and suffix at once, nothing for the cached steps
    assert found.equal(wanted)
    assert not found.equal(plain)


def test_without_a_cache_every_pass_edits_the_prompt(edits_made: list[int]) -> None:
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    wanted = greedy_by_hand(reft_model.model, batch, NEW, prompt_edits(reft_model, batch["attention_mask"]))
    edits_made.clear()
    found = reft_model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert found.equal(wanted)
    assert len(edits_made) == LAYERS * NEW


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams(use_cache: bool) -> None:
    reft_model = make()
    batch = random_batch([6, 4], side="left")
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with edited_by_hand(prompt_edits(reft_model, batch["attention_mask"], repeats=3)):
        wanted = reft_model.model.generate(**batch, **options, use_cache=False)
    assert reft_model.generate(**batch, **options, use_cache=use_cache).equal(wanted)
    assert not reft_model.model.generate(**batch, **options).equal(wanted)


def test_pyrefts_call(edits_made: list[int]) -> None:
    reft_model = make()
    batch = random_batch([6, 4], side="left")
    heads, tails = ends(batch["attention_mask"], 2, 2)
    locations = {"sources->base": (None, [heads] * LAYERS + [tails] * LAYERS)}
    options = {"max_new_tokens": NEW, "do_sample": False}
    wanted = reft_model.generate(**batch, **options)
    for keywords in ({"unit_locations": locations, "intervene_on_prompt": True}, {}, {"positions": "f2+l2"}):
        edits_made.clear()
        original, found = reft_model.generate(batch, **keywords, **options)
        assert edits_made == [2] * LAYERS
        assert original is None
        assert found.equal(wanted)
    original, found = reft_model.generate(batch, output_original_output=True, **options)
    assert original.equal(reft_model.model.generate(**batch, **options))
    assert found.equal(wanted)
    # Two sequences for each prompt share its positions.
    table = torch.tensor([heads] * LAYERS + [tails] * LAYERS)
    torch.manual_seed(0)
    sampled = {**options, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    twice = reft_model.generate(**batch, intervention_locations=table.transpose(0, 1), **sampled)
    assert twice.equal(wanted.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 2},
    ],
)
def test_other_ways_to_prefill(options: dict[str, Any]) -> None:
    reft_model = make()
    # transformers 4 prefills in chunks as if nothing were padded.
    padded = "prefill_chunk_size" not in options or TRANSFORMERS >= 5
    batch = random_batch([7, 5 if padded else 7], side="left")
    common = {"max_new_tokens": NEW, "do_sample": False}
    wanted = reft_model.generate(**batch, **common)
    assert reft_model.generate(**batch, **common, **options).equal(wanted)
    assert not reft_model.model.generate(**batch, **common, **options).equal(wanted)


def test_a_cached_prefix_is_not_edited_again() -> None:
    reft_model = make()
    ids = random_batch([8])["input_ids"]
    options = {"max_new_tokens": NEW, "do_sample": False}
    wanted = reft_model.generate(input_ids=ids, **options)
    with edited_by_hand(prompt_edits(reft_model, torch.ones_like(ids))), torch.no_grad():
        past = reft_model.model(input_ids=ids[:, :3], past_key_values=transformers.DynamicCache()).past_key_values
    assert reft_model.generate(input_ids=ids, past_key_values=past, **options).equal(wanted)


def test_assisted_generation() -> None:
    reft_model = make()
    reft_model.model.generation_config.eos_token_id = VOCABULARY  # one that is never drawn
    ids = random_batch([8])["input_ids"].repeat(1, 2)
    options = {"max_new_tokens": NEW, "do_sample": False}
    wanted = reft_model.generate(input_ids=ids, **options)
    assert reft_model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options).equal(wanted)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("which", ["every token", "generated tokens"])
def test_edits_beyond_the_prompt(which: str, use_cache: bool) -> None:
    reft_model = make(positions=None)
    batch = random_batch([6, 4], side="left")
    modules = list(reft_model.interventions.values())
    rows = None if which == "every token" else [list(range(6, 6 + NEW))] * 2
    edits = [(module, "output", modules[i], rows) for i, module in enumerate(blocks(reft_model.model))]
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits)
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache}
    found = reft_model.generate(**batch, intervene_on_prompt=which == "every token", **options)
    assert found.equal(wanted)
    assert not found.equal(reft_model.model.generate(**batch, **options))


def test_prompt_positions_beside_every_token() -> None:
    """One intervention of a layer edits the whole sequence, another the end of the prompt."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    ours = [LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2) for _ in range(2)]
    for module in ours:
        strengthen(module)
    config = ReftConfig(
        [{"layer": 1, "intervention": ours[0]}, {"layer": 1, "intervention": ours[1], "positions": "l2"}]
    )
    reft_model = get_reft_model(model, config).eval()
    batch = random_batch([6, 6])
    edits: list[Any] = [
        (blocks(model)[1], "output", ours[0], None),
        (blocks(model)[1], "output", ours[1], [[4, 5]] * 2),
    ]
    wanted = greedy_by_hand(model, batch, NEW, edits)
    assert reft_model.generate(**batch, max_new_tokens=NEW, do_sample=False).equal(wanted)


def test_the_mask_that_generate_finds_itself() -> None:
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    options = {"max_new_tokens": NEW, "do_sample": False}
    wanted = reft_model.generate(**batch, **options)
    assert reft_model.generate(input_ids=batch["input_ids"], **options).equal(wanted)
    assert reft_model.generate(inputs=batch["input_ids"], **options).equal(wanted)
    # Padding that is also the end token counts as attended, there and here.
    reft_model.model.generation_config.eos_token_id = 0
    attended = torch.ones_like(batch["input_ids"])
    wanted = reft_model.generate(input_ids=batch["input_ids"], attention_mask=attended, **options)
    assert reft_model.generate(input_ids=batch["input_ids"], **options).equal(wanted)


def test_generation_that_makes_no_sense() -> None:
    reft_model = make()
    ids = random_batch([6, 6])["input_ids"]
    with pytest.raises(ValueError, match="generate needs input_ids"):
        reft_model.generate(max_new_tokens=2)
    for limit in ({"max_new_tokens": 2}, {"max_length": 8}):
        with pytest.raises(ValueError, match="position 8, but the input has 6 tokens and is generated up to 8"):
            reft_model.generate(input_ids=ids, unit_locations=8, **limit)
    with pytest.raises(ValueError, match="can only name position 0"):
        reft_model.generate(input_ids=ids, unit_locations=3, intervene_on_prompt=False, max_new_tokens=2)


def test_an_encoder_is_edited_once() -> None:
    config = transformers.T5Config(vocab_size=20, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    config.decoder_start_token_id, config.eos_token_id = 0, None
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    strengthen(intervention)
    place = {"component": "encoder.block[0].output", "intervention": intervention, "positions": "f1+l1"}
    reft_model = get_reft_model(model, ReftConfig(place)).eval()
    batch = {"input_ids": torch.randint(3, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2, "output_scores": True}
    options["return_dict_in_generate"] = True
    with edited_by_hand([(model.encoder.block[0], "output", intervention, [[0, 5]] * 2)]):
        wanted = model.generate(**batch, **options)
    found = reft_model.generate(**batch, **options)
    assert found.sequences.equal(wanted.sequences)
    torch.testing.assert_close(found.scores[0], wanted.scores[0], rtol=1e-4, atol=1e-4)
    assert not found.scores[0].equal(model.generate(**batch, **options).scores[0])


def test_a_generation_that_never_calls_the_model() -> None:
    """Then nothing would be edited, in silence."""
    reft_model = make()
    reft_model.model.generate = lambda **_: torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="did not call its LlamaModel"):
        reft_model.generate(input_ids=torch.ones(1, 3, dtype=torch.long))
