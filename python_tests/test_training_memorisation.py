"""Memorisation: the prefix that a model says right, by generation and by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from tiny_models import tiny_model
from training_support import make_llama, make_tokenizer
from transformers import TrainingArguments

from reft_kernels import ReftConfig, ReftModel, ReftTrainerForCausalLM, get_reft_model, make_supervised_data_module
from reft_kernels.training.data import encode_prompts
from reft_kernels.training.memorisation import By, Recital, recite

PROMPT = "which colour is the red box ?"


def said_by_hand(model: Any, tokenizer: Any, count: int) -> list[int]:
    """Greedy decoding, one full pass a token; the edits are at the prompt."""
    ids = encode_prompts(tokenizer, [PROMPT])[0]
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            given = torch.tensor([ids])
            inputs: dict[str, Any] = {"input_ids": given, "attention_mask": torch.ones_like(given)}
            if isinstance(model, ReftModel):
                inputs["intervention_locations"] = torch.tensor([[[0, start - 1]] * len(model.representations)])
            ids = [*ids, int(model(**inputs).logits[0, -1].argmax())]
    return ids[start:]


def models() -> dict[str, Any]:
    edited = get_reft_model(
        make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="f1+l1", tied=True)
    )
    with torch.no_grad():
        for module in edited.interventions.values():
            module.learned_source.weight.mul_(8)
    return {"plain": make_llama(), "edited": edited.eval()}


@pytest.mark.parametrize("by", get_args(By))
@pytest.mark.parametrize("name", ["plain", "edited"])
def test_the_prefix_up_to_the_first_mistake(name: str, by: By) -> None:
    tokenizer, model = make_tokenizer(), models()[name]
    said = said_by_hand(model, tokenizer, 12)
    for wrong in (0, 5, 11, None):
        target = [token + 1 if index == wrong else token for index, token in enumerate(said)]
        found = recite(model, tokenizer, PROMPT, target, by=by)
        assert found.target == target
        assert found.length == (12 if wrong is None else wrong)
        assert found.share == found.length / 12
        assert len(found.said) == 12
        assert found.said[: (wrong if wrong is not None else 12)] == target[:wrong]
    assert recite(model, tokenizer, PROMPT, said, by=by) == Recital(said, said)


def test_the_edits_count() -> None:
    tokenizer = make_tokenizer()
    plain, edited = (said_by_hand(model, tokenizer, 12) for model in models().values())
    assert plain != edited


@pytest.mark.parametrize("by", get_args(By))
def test_a_text_is_tokenised_after_its_prompt(by: By) -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    found = recite(model, tokenizer, PROMPT, " please red", by=by)
    whole = encode_prompts(tokenizer, [f"{PROMPT} please red"])[0]
    assert found.target == whole[len(encode_prompts(tokenizer, [PROMPT])[0]) :]


def test_end_tokens_are_said_like_any_other() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every logit is 0, and the first token, 0, the largest
    model.generation_config.eos_token_id = 0
    model.generation_config.repetition_penalty = 1.5
    assert recite(model, tokenizer, PROMPT, [0] * 6).said == [0] * 6


def test_a_rank_one_edit_learns_a_text(tmp_path: Any) -> None:
    """The paper's experiment, as small as it goes: ConsReFT of rank 1 at the last token of the prompt."""
    tokenizer = make_tokenizer()
    model = get_reft_model(make_llama(), ReftConfig(method="consreft", layers=[0], rank=1, positions="l1"))
    target = "the red box"
    before = recite(model, tokenizer, PROMPT, target)
    data = make_supervised_data_module(tokenizer, model, [PROMPT], [target])
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=150,
        learning_rate=5e-2,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    ReftTrainerForCausalLM(model, args, **data).train()
    after = {by: recite(model, tokenizer, PROMPT, target, by=by) for by in get_args(By)}
    assert after["generation"].length == after["teacher_forcing"].length > before.length


def test_training_mode_is_restored() -> None:
    model = models()["edited"].train()
    recite(model, make_tokenizer(), PROMPT, "red")
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("", "red", "prompt has no tokens: ''"),
        ("red", "", "the target '' adds no token to the prompt 'red'"),
        ("", [5], "prompt and target must have tokens, got 0 and 1"),
        ("red", [], "prompt and target must have tokens, got 2 and 0"),
    ],
)
def test_bad_arguments_are_named(prompt: str, target: str | Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recite(make_llama(), make_tokenizer(), prompt, target)


def test_unknown_ways_are_named() -> None:
    with pytest.raises(ValueError, match="by must be one of generation, teacher_forcing, got 'heart'"):
        recite(tiny_model("llama"), make_tokenizer(), "red", "box", by="heart")  # type: ignore[arg-type]
