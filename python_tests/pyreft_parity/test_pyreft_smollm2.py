"""SmolLM2-135M, all 30 layers edited, rank 8, f7+l7: our logits and generations against stock pyreft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peer import Models, assert_equal_within, build_models, prompt_columns, unit_locations
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

POSITIONS, RANK, LAYERS = "f7+l7", 8, 30

# Relative to the largest logit. Both sides are fp32 with edits that sum in different orders, and every rounding
# error is carried on through the network: the frozen model alone is 2e-6 from its fp64 self, stock 4e-6, and the
# two sides were seen 1.1e-5 apart. A wrong position, weight or sign moves the logits by a tenth and more.
LOGITS = 3e-5

PROMPTS = (
    "The capital of France is Paris, the capital of Italy is Rome, and the capital of Japan is",
    "Question: which of these animals lays eggs: the dog, the hen, the horse or the whale?\nAnswer:",
    "Below is an instruction that describes a task. Write a response.\n\nAdd 12 and 30.\n\nResponse:",
    "Once upon a time there was",  # too short for f7+l7
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request: pytest.FixtureRequest, smollm2: Path) -> tuple[Models, bool]:
    """The two models, and whether prefix and suffix share one intervention a layer."""
    torch.manual_seed(11)

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    tied: bool = request.param
    built = build_models(load, "LoreftIntervention", range(LAYERS), RANK, positions=POSITIONS, tied=tied)
    return built, tied


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert min(map(len, rows)) < 14 < max(map(len, rows))
    return rows


def encode(prompts: list[Tensor], side: str, both: tuple[Models, bool]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The padded batch, and stock's locations for it. One masked column stands in front of every row, also
    where the padding is on the right: stock sends the edits that have no token there.
    """
    models, tied = both
    width = max(map(len, prompts)) + 1
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    per_example = []
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if side == "left" else 1
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
        per_example.append(prompt_columns(len(prompt), POSITIONS, len(models.pairs), tied, start))
    return {"input_ids": ids, "attention_mask": mask}, unit_locations(per_example)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits(both: tuple[Models, bool], prompts: list[Tensor], side: str) -> None:
    models, _ = both
    inputs, where = encode(prompts, side, both)
    attended = inputs["attention_mask"].bool()
    expected = models.theirs(inputs, unit_locations=where)[1].logits[attended]
    plain = models.theirs.model(**inputs).logits[attended]
    assert float((plain - expected).abs().max()) > 0.1 * float(expected.abs().max())
    given = models.ours(inputs, unit_locations=where)[1].logits[attended]
    from_mask = models.ours(**inputs).logits[attended]
    for actual in (given, from_mask):
        assert_equal_within(actual, expected, LOGITS, "logits")
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_batched_generation(both: tuple[Models, bool], prompts: list[Tensor]) -> None:
    """Left-padded and greedy, the prompt edited once; stock is given the locations of each row."""
    models, _ = both
    inputs, where = encode(prompts, "left", both)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    theirs = models.theirs.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)[1]
    given = models.ours.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)[1]
    from_mask = models.ours.generate(**inputs, **options)
    for ours in (given, from_mask):
        assert torch.equal(ours.sequences, theirs.sequences)
        expected = torch.stack(theirs.logits)
        assert_equal_within(torch.stack(ours.logits), expected, LOGITS, "logits of the generated tokens")
