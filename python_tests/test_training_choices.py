"""Multiple choice by likelihood: the scores, the prompt run once, the edits, and the accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from training_support import COLOURS, make_llama, make_tokenizer, rows
from transformers import LlamaForCausalLM

from reft_kernels import ReftConfig, ReftModel, get_reft_model
from reft_kernels.training import choices
from reft_kernels.training.choices import ChoicePrediction, Score, answer_choices, evaluate_choices, score_choices
from reft_kernels.training.data import Example, SupervisedDataset, build_prompt, encode_prompts

PROMPTS = [build_prompt(row["instruction"]) for row in rows(5)]
# Of different lengths; one is a single token, one begins another.
TARGETS = [
    ["red", "the correct answer is red", "the correct answer"],
    ["\n"],
    ["the correct answer is blue", "blue", "a box please", "red box"],
    ["white", "black"],
    ["the correct answer is white", "x"],
]


def edit(base: nn.Module, positions: str | None = "f2+l2", *, tied: bool = False, **options: Any) -> ReftModel:
    """With W of a size that shows in every logit."""
    torch.manual_seed(1)
    model = get_reft_model(
        base, ReftConfig(method="loreft", layers="all", rank=2, positions=positions, tied=tied, **options)
    )
    with torch.no_grad():
        for module in model.interventions.values():
            module.learned_source.weight.mul_(5)
    return model


def by_hand(model: Any, tokenizer: Any, prompt: str, target: str) -> float:
    """One row, no padding, no cache; the edits by the locations that training has."""
    whole = encode_prompts(tokenizer, [prompt + target])[0]
    start = len(encode_prompts(tokenizer, [prompt])[0])
    ids = torch.tensor([whole])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(model, ReftModel):
        data = SupervisedDataset(tokenizer, model, [prompt], [target], append_eos=False)
        assert data[0]["input_ids"].tolist() == whole
        if "intervention_locations" in data[0]:
            inputs["intervention_locations"] = data[0]["intervention_locations"][None]
    with torch.no_grad():
        logits = model(**inputs).logits[0].double().log_softmax(-1)
    return float(sum(logits[k - 1, whole[k]] for k in range(start, len(whole))))


MODELS = {
    "plain": lambda: make_llama().double(),
    "untied": lambda: edit(make_llama().double(), dtype=torch.float64),
    "tied": lambda: edit(make_llama().double(), "f1+l3", tied=True, dtype=torch.float64),
    "suffix": lambda: edit(make_llama().double(), "l1", dtype=torch.float64),
    "every token": lambda: edit(make_llama().double(), "all", dtype=torch.float64),
}


@pytest.mark.parametrize("share_prompt", [True, False], ids=["prompt once", "prompt each time"])
@pytest.mark.parametrize("name", MODELS)
def test_scores(name: str, share_prompt: bool) -> None:
    tokenizer, model = make_tokenizer(), MODELS[name]()
    found = score_choices(model, tokenizer, PROMPTS, TARGETS, batch_size=5, share_prompt=share_prompt)
    assert [len(scores) for scores in found] == [len(targets) for targets in TARGETS]
    for prompt, targets, scores in zip(PROMPTS, TARGETS, found, strict=True):
        start = len(encode_prompts(tokenizer, [prompt])[0])
        for target, score in zip(targets, scores, strict=True):
            assert score.log_prob == pytest.approx(by_hand(model.eval(), tokenizer, prompt, target), rel=1e-9)
            assert score.tokens == len(encode_prompts(tokenizer, [prompt + target])[0]) - start
            assert score.bytes == len(target.encode())


def test_edits_change_the_scores_and_can_be_turned_off() -> None:
    tokenizer, model = make_tokenizer(), MODELS["untied"]()
    plain = score_choices(model.model, tokenizer, PROMPTS, TARGETS)
    found = score_choices(model, tokenizer, PROMPTS, TARGETS)
    for one, other in zip(plain, found, strict=True):
        for before, after in zip(one, other, strict=True):
            assert abs(before.log_prob - after.log_prob) > 1e-3
    with model.disable_edits():
        assert score_choices(model, tokenizer, PROMPTS, TARGETS) == plain


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen2", "gemma2", "mistral"])
def test_other_architectures(architecture: str, share_prompt: bool) -> None:
    """Also with windows of attention that are shorter than the prompts."""
    tokenizer = make_tokenizer()
    options: dict[str, Any] = {"vocab_size": 320}
    if architecture in ("gemma2", "mistral"):
        options["sliding_window"] = 7
    # Gemma 2 has NaN in float64, where padding attends to nothing: its softmax is in float32.
    dtype, bound = (torch.float32, 1e-4) if architecture == "gemma2" else (torch.float64, 1e-6)
    model = edit(tiny_model(architecture, **options).to(dtype), dtype=dtype)
    found = score_choices(model, tokenizer, PROMPTS[:3], TARGETS[:3], share_prompt=share_prompt)
    for prompt, targets, scores in zip(PROMPTS, TARGETS, found, strict=False):
        for target, score in zip(targets, scores, strict=True):
            assert score.log_prob == pytest.approx(by_hand(model.eval(), tokenizer, prompt, target), rel=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    tokenizer = make_tokenizer()
    model, exact = (edit(make_llama().to(kind), dtype=kind) for kind in (dtype, torch.float64))
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, strict=False)
    wanted = score_choices(exact, tokenizer, PROMPTS, TARGETS)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    for share_prompt in (True, False):
        found = score_choices(model, tokenizer, PROMPTS, TARGETS, share_prompt=share_prompt)
        for one, other in zip(wanted, found, strict=True):
            for right, score in zip(one, other, strict=True):
                assert score.log_prob == pytest.approx(right.log_prob, rel=bound)


def test_the_prompt_is_run_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    seen: list[int] = []
    run = LlamaForCausalLM.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].numel())
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    prompt, targets = PROMPTS[0], ["red", "blue", "green", "white"]
    score_choices(model, tokenizer, [prompt], [targets])
    once, seen[:] = sum(seen), []
    score_choices(model, tokenizer, [prompt], [targets], share_prompt=False)
    length, *whole = map(len, encode_prompts(tokenizer, [prompt, *(prompt + target for target in targets)]))
    longest = max(whole) - length
    assert longest > 1
    assert once == length + 4 * (longest - 1)
    assert sum(seen) == 4 * max(whole)


def test_a_token_across_the_border_counts_for_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training; such a prompt is not shared."""
    tokenizer, model = make_tokenizer(), make_llama().double()
    prompt, targets = "which colour is the b", ["ox please", "x"]
    alone, whole = encode_prompts(tokenizer, [prompt, prompt + targets[0]])
    assert whole[: len(alone)] != alone
    shared: list[Any] = []
    original = choices._shared
    monkeypatch.setattr(choices, "_shared", lambda *given: shared.append(given) or original(*given))
    ((one, other), _) = score_choices(model, tokenizer, [prompt, PROMPTS[0]], [targets, ["red"]])
    assert len(shared) == 1
    assert one.tokens == len(whole) - len(alone)
    assert one.log_prob == pytest.approx(by_hand(model, tokenizer, prompt, targets[0]), rel=1e-9)
    assert other.log_prob == pytest.approx(by_hand(model, tokenizer, prompt, targets[1]), rel=1e-9)


def test_normalised() -> None:
    score = Score(-6.0, 3, 12)
    assert [score.normalised(by) for by in ("none", "token", "byte")] == [-6.0, -2.0, -0.5]


# Accuracy


def examples() -> list[Example]:
    return [
        Example(f"is it {colour}?\n\nAnswer format: {'/'.join(COLOURS[:3])}", output=f"the correct answer is {gold}")
        for colour, gold in zip(COLOURS, ("red", "green", "blue", "red", "red", "blue"), strict=True)
    ]


def test_answer_choices() -> None:
    assert answer_choices("a Answer format: true/false\n\nAnswer format: yes/no/maybe") == ["yes", "no", "maybe"]
    for text in ("a", "Answer format: true", "Answer format: a/b or so"):
        with pytest.raises(ValueError, match="expected 'Answer format: A/B' at the end of the instruction"):
            answer_choices(text)


@pytest.mark.parametrize("normalise", ["none", "token", "byte"])
def test_accuracy(normalise: Any) -> None:
    tokenizer, model = make_tokenizer(), MODELS["untied"]()
    result = evaluate_choices(model, tokenizer, examples(), normalise=normalise)
    assert (result.total, result.unanswered, len(result.predictions)) == (6, 0, 6)
    right = 0
    for example, row in zip(examples(), result.predictions, strict=True):
        assert isinstance(row, ChoicePrediction)
        assert row.choices == COLOURS[:3]
        targets = [f"the correct answer is {choice}" for choice in row.choices]
        scores = [by_hand(model.eval(), tokenizer, row.prompt, target) for target in targets]
        assert [score.log_prob for score in row.scores] == pytest.approx(scores, rel=1e-9)
        values = [score.normalised(normalise) for score in row.scores]
        assert row.answer == row.choices[values.index(max(values))]
        assert row.text == f"the correct answer is {row.answer}"
        assert row.gold == str(example.output).split()[-1]
        assert row.correct == (row.answer == row.gold)
        right += row.correct
    assert result.correct == right
    assert 0 < right < 6


def test_choices_of_the_callers_own() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    given = [Example("1 + 1 ?", answer="2.0"), Example("2 + 2 ?", answer="4")]
    offered = [["1", "2"], ["4", "5", "6"]]
    result = evaluate_choices(model, tokenizer, given, choices=offered, style="gsm8k", rule="math")
    assert [row.gold for row in result.predictions] == ["2.0", "4"]
    assert [list(row.choices) for row in result.predictions] == offered
    assert all(row.prompt.endswith("the final number.\n") for row in result.predictions)
    assert all(row.text == row.answer for row in result.predictions)


def test_training_mode_is_restored() -> None:
    model = MODELS["untied"]().train()
    evaluate_choices(model, make_tokenizer(), examples()[:1])
    assert model.training
    assert all(module.training for module in model.interventions.values())


def test_bad_arguments_are_named() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    with pytest.raises(ValueError, match="no examples"):
        evaluate_choices(model, tokenizer, [])
    with pytest.raises(ValueError, match="normalise must be one of none, token, byte, got 'word'"):
        evaluate_choices(model, tokenizer, examples(), normalise="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected choices for each of 6 examples, got 1"):
        evaluate_choices(model, tokenizer, examples(), choices=[["a"]])
    with pytest.raises(ValueError, match="example 0: the answer 'red' is none of its choices a, b"):
        evaluate_choices(model, tokenizer, examples()[:1], choices=[["a", "b"]])
    with pytest.raises(ValueError, match="expected targets for each of 1 prompts, got 2"):
        score_choices(model, tokenizer, ["a"], [["b"], ["c"]])
    with pytest.raises(ValueError, match="prompt 1 has no targets"):
        score_choices(model, tokenizer, ["a", "b"], [["b"], []])
    with pytest.raises(ValueError, match="prompt has no tokens: ''"):
        score_choices(model, tokenizer, [""], [["b"]])
    with pytest.raises(ValueError, match="the target '' adds no token to the prompt 'a'"):
        score_choices(model, tokenizer, ["a"], [[""]])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_choices(model, tokenizer, ["a"], [["b"]], batch_size=0)
