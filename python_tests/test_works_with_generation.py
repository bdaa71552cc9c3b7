"""Generation with positions of the whole sequence, prompt and generated tokens, in every way of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hand_edits import edited_by_hand, greedy_by_hand, strengthen
from tiny_models import DECODERS, LAYERS, VOCABULARY, random_batch, tiny_model
from torch import Tensor, nn

import reft_kernels.hooks
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
TRANSFORMERS = int(transformers.__version__.split(".")[0])


def make(architecture: str = "llama", **settings: Any) -> ReftModel:
    model = tiny_model(architecture)
    model.generation_config.eos_token_id = None
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": None}
    reft_model = get_reft_model(model, ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def blocks(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


def edits_at(reft_model: ReftModel, rows: list[Any]) -> list[Any]:
    """Edits by hand of the blocks, at rows [num_interventions][B][P]."""
    modules = reft_model.interventions.values()
    return [
        (block, "output", module, table)
        for block, module, table in zip(blocks(reft_model.model), modules, rows, strict=True)
    ]


# Of three layers and two prompts of 7 columns, the second one padded by 3 on the left: in the prompt, at its end, in
# what is generated, at tokens next to each other, at none.
ROWS = [[[0, 8], [4, 11]], [[6, 7, 9], [6, 10]], [[10], []]]


@pytest.mark.parametrize("architecture", DECODERS)
def test_positions_past_the_prompt(architecture: str) -> None:
    reft_model = make(architecture)
    batch = random_batch([7, 4], side="left")
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits_at(reft_model, ROWS))
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    found = reft_model.generate(**batch, unit_locations={"sources->base": (None, ROWS)}, **options)
    assert found.sequences.equal(wanted)
    prompt_only = [[[p for p in row if p < 7] for row in part] for part in ROWS]
    other = reft_model.generate(**batch, unit_locations=prompt_only, **options)
    assert found.logits[0].equal(other.logits[0])
    assert not found.logits[-1].equal(other.logits[-1])


@pytest.mark.parametrize("form", ["tensor", "collator"])
def test_forms_of_positions(form: str) -> None:
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    width = max(len(row) for part in ROWS for row in part)
    table = torch.tensor([[row + [-1] * (width - len(row)) for row in part] for part in ROWS])
    keywords = {"unit_locations": table} if form == "tensor" else {"intervention_locations": table.transpose(0, 1)}
    wanted = reft_model.generate(**batch, unit_locations=ROWS, **GREEDY)
    assert reft_model.generate(**batch, **keywords, **GREEDY).equal(wanted)


@pytest.mark.parametrize("positions", [None, ROWS])
def test_generation_equals_a_teacher_forced_forward(positions: Any) -> None:
    """The scores of every step are the logits of one edited forward over the whole sequence."""
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    out = reft_model.generate(**batch, unit_locations=positions, **options)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        forced = reft_model(
            input_ids=out.sequences, attention_mask=mask, position_ids=places, unit_locations=positions
        ).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), forced[:, 6:-1], rtol=1e-4, atol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
    "static cache in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("positions", [None, ROWS], ids=["every token", "positions"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_decode(way: str, positions: Any) -> None:
    reft_model = make()
    # transformers 4 prefills in chunks as if nothing were padded.
    padded = TRANSFORMERS >= 5 or "prefill_chunk_size" not in WAYS[way]
    batch = random_batch([7, 4 if padded else 7], side="left")
    rows = [None] * LAYERS if positions is None else positions
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits_at(reft_model, rows))
    options = {**GREEDY, **WAYS[way], "output_logits": True, "return_dict_in_generate": True}
    found = reft_model.generate(**batch, unit_locations=positions, **options)
    assert found.sequences.equal(wanted)
    assert not found.logits[-1].equal(reft_model.model.generate(**batch, **options).logits[-1])


@pytest.mark.parametrize("settings", [{}, {"positions": "f2+l2"}], ids=["every token", "f2+l2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch_is_its_prompts_one_by_one(settings: dict[str, Any], options: dict[str, Any]) -> None:
    reft_model = make(**settings)
    lengths = [7, 4, 5]
    batch = random_batch(lengths, side="left")
    together = reft_model.generate(**batch, **GREEDY, **options)[:, 7:]
    for row, length in enumerate(lengths):
        alone = reft_model.generate(input_ids=batch["input_ids"][row : row + 1, 7 - length :], **GREEDY, **options)
        assert alone[0, length:].equal(together[row])


@pytest.mark.parametrize("positions", [None, ROWS], ids=["every token", "positions"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "beams in a static cache", "sampled", "beam samples"],
)
def test_beams_and_samples(options: dict[str, Any], positions: Any) -> None:
    """Every beam and every sequence of a prompt has its prompt's positions."""
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    rows = [None if part is None else [row for row in part for _ in range(copies)] for part in positions or [None] * 3]
    torch.manual_seed(1)
    with edited_by_hand(edits_at(reft_model, rows)):
        wanted = reft_model.model.generate(
            **batch,
            max_new_tokens=NEW,
            use_cache=False,
            **{k: v for k, v in options.items() if k != "cache_implementation"},
        )
    torch.manual_seed(1)
    found = reft_model.generate(**batch, unit_locations=positions, max_new_tokens=NEW, **options)
    assert found.equal(wanted)


@pytest.mark.parametrize("positions", [None, [[[3, 17, 19]], [[15, 16, 18]], [[18]]]], ids=["every token", "positions"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "own assistant"])
def test_assisted_decoding(way: str, positions: Any) -> None:
    """Guessed tokens are checked several at once, and dropped again; the edits stay at their places."""
    reft_model = make()
    reft_model.model.generation_config.eos_token_id = VOCABULARY  # one that is never drawn
    ids = random_batch([8])["input_ids"].repeat(1, 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = [None] * LAYERS if positions is None else positions
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits_at(reft_model, rows))
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        other = tiny_model("llama", seed=5)
        other.generation_config.eos_token_id = VOCABULARY
        options = {"assistant_model": other}
    elif way == "own assistant":
        options = {"assistant_model": reft_model.model}
    found = reft_model.generate(**batch, unit_locations=positions, **GREEDY, **options)
    assert found.equal(wanted)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_steps_without_edits_cost_none(implementation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reft_model = make()
    made: list[int] = []
    edit_rows = reft_kernels.hooks.edit_rows

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args[1].shape[1])
        return edit_rows(*args, **kwargs)

    monkeypatch.setattr(reft_kernels.hooks, "edit_rows", counted)
    batch = random_batch([7, 7])
    reft_model.generate(
        **batch, unit_locations=[[[2, 9], [3, 9]]] * LAYERS, cache_implementation=implementation, **GREEDY
    )
    assert made == [7] * LAYERS + [1] * LAYERS  # the prompt, then the token at position 9


def test_embeddings_for_a_prompt() -> None:
    reft_model = make()
    batch = random_batch([7, 4], side="left")
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits_at(reft_model, ROWS))[:, 7:]
    embeddings = reft_model.model.get_input_embeddings()(batch["input_ids"])
    found = reft_model.generate(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], unit_locations=ROWS, **GREEDY
    )
    assert found.equal(wanted)


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 compiles on GPUs alone")
def test_compiled_decoding() -> None:
    """A static cache makes `generate` compile its steps."""
    reft_model = make()
    batch = random_batch([7, 7])
    wanted = reft_model.generate(**batch, **GREEDY)
    compile_config = transformers.CompileConfig(backend="eager", fullgraph=True)
    compile_config._compile_all_devices = True
    reft_model.model.generation_config.compile_config = compile_config
    options = {**GREEDY, "cache_implementation": "static"}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert reft_model.generate(**batch, **options).equal(wanted)
    assert reft_model.generate(**batch, **options).equal(wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Positions that are generated would make every step a graph of its own.
    rows = [[[0, 8], [4, 11]]] * LAYERS
    wanted = greedy_by_hand(reft_model.model, batch, NEW, edits_at(reft_model, rows))
    assert reft_model.generate(**batch, unit_locations=rows, **options).equal(wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
