"""Answers, batched generation with left padding, and accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training_support import make_llama, make_tokenizer, rows

from reft_kernels.training.answers import DEFAULT_TRIGGER, exact_match, extract_answer
from reft_kernels.training.data import Example, build_prompt, encode_prompts
from reft_kernels.training.decoding import decoding_settings
from reft_kernels.training.evaluate import evaluate_accuracy, generate_texts


class Scripted(nn.Module):
    """Answers each prompt with a given text, and remembers how it was called."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.answers = answers
        self.calls: list[dict[str, Any]] = []

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **keywords: Any) -> torch.Tensor:
        self.calls.append({"input_ids": input_ids, "attention_mask": attention_mask, **keywords})
        found = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            found.append(self.tokenizer(self.answers[prompt] + "</s>")["input_ids"])
        width = max(map(len, found))
        return torch.cat([input_ids, torch.tensor([row + [1] * (width - len(row)) for row in found])], dim=1)


def test_extract_answer() -> None:
    assert extract_answer("so the correct answer is  answer2 \n") == "answer2"
    assert extract_answer("the correct answer is a the correct answer is b") == "a the correct answer is b"
    assert extract_answer("answer2") == ""
    assert extract_answer(" answer2 ", trigger="") == "answer2"
    assert extract_answer("x #### 42", trigger="####") == "42"


def test_exact_match() -> None:
    assert exact_match("a ", " a")
    assert not exact_match("a", "b")
    assert not exact_match("", "")


def test_accuracy_counts_each_kind_of_row() -> None:
    tokenizer = make_tokenizer()
    examples = [
        Example("red ?", output="the correct answer is red", answer="red"),
        Example("green ?", output="the correct answer is green", answer="green"),
        Example("blue ?", output="the correct answer is blue"),
        Example("white ?", answer="white"),
        Example("black ?", output="black"),
        Example("brown ?", output="the correct answer is brown", answer="brown"),
    ]
    said = {
        "red ?\n": "the correct answer is red",
        "green ?\n": "the correct answer is red",
        "blue ?\n": "oh the correct answer is blue ",
        "white ?\n": "the correct answer is white",
        "black ?\n": "black",
        "brown ?\n": "brown",
    }
    model = Scripted(tokenizer, said)
    result = evaluate_accuracy(model, tokenizer, examples, batch_size=4)
    assert [prediction.correct for prediction in result.predictions] == [True, False, True, True, True, False]
    assert [prediction.gold for prediction in result.predictions] == [
        "red",
        "green",
        "blue",
        "white",
        "black",
        "brown",
    ]
    assert [prediction.prompt for prediction in result.predictions] == list(said)
    assert (result.correct, result.total, result.unanswered) == (4, 6, 1)
    assert result.accuracy == pytest.approx(4 / 6)
    assert [len(call["input_ids"]) for call in model.calls] == [4, 2]
    assert all(call["do_sample"] is False and call["max_new_tokens"] == 32 for call in model.calls)


def test_prompts_are_padded_on_the_left_and_masked_by_length() -> None:
    tokenizer = make_tokenizer()
    prompts = ["red", "which colour is the red box ?", "a b"]
    model = Scripted(tokenizer, dict.fromkeys(prompts, "x"))
    assert generate_texts(model, tokenizer, prompts, batch_size=3) == ["x", "x", "x"]
    (call,) = model.calls
    lengths = sorted((len(ids) for ids in encode_prompts(tokenizer, prompts)), reverse=True)
    width = max(lengths)
    assert call["attention_mask"].tolist() == [[0] * (width - n) + [1] * n for n in lengths]


def test_batches_continue_a_model_as_single_prompts_do() -> None:
    tokenizer, model = make_tokenizer(), make_llama().double()
    prompts = [build_prompt(row["instruction"]) for row in rows(9)]
    together = generate_texts(model, tokenizer, prompts, batch_size=4, max_new_tokens=8)
    alone = [generate_texts(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_generation_ends_at_the_end_token_that_training_appends() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    model.generation_config.eos_token_id = 7
    scripted = Scripted(tokenizer, {"red": "x"})
    scripted.generation_config = model.generation_config
    generate_texts(scripted, tokenizer, ["red"])
    assert scripted.calls[0]["eos_token_id"] == [1, 7]


def test_training_mode_is_restored() -> None:
    tokenizer, model = make_tokenizer(), make_llama().train()
    generate_texts(model, tokenizer, ["red"], max_new_tokens=2)
    assert model.training


def test_sampling_keywords_reach_the_model() -> None:
    tokenizer = make_tokenizer()
    model = Scripted(tokenizer, {"red": "x"})
    generate_texts(model, tokenizer, ["red"], do_sample=True, temperature=0.5)
    assert model.calls[0]["do_sample"] is True
    assert model.calls[0]["temperature"] == 0.5


def test_bad_arguments_are_named() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate_texts(model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="prompt has no tokens: ''"):
        generate_texts(model, tokenizer, ["a", ""])
    with pytest.raises(ValueError, match="no examples"):
        evaluate_accuracy(model, tokenizer, [])
    with pytest.raises(ValueError, match="example 1 has no gold answer: neither an answer nor an output"):
        evaluate_accuracy(model, tokenizer, [Example("a", answer="b"), Example("a")])
    with pytest.raises(ValueError, match="give template or style, not both"):
        evaluate_accuracy(model, tokenizer, [Example("a", answer="b")], template="%s", style="gsm8k")
    for given in ({"trigger": ""}, {"match": exact_match}):
        with pytest.raises(ValueError, match="give rule, or trigger and match, not both"):
            evaluate_accuracy(model, tokenizer, [Example("a", answer="b")], rule="math", **given)
    with pytest.raises(ValueError, match="rule must be one of commonsense, math, gsm8k, got 'maths'"):
        evaluate_accuracy(model, tokenizer, [Example("a", answer="b")], rule="maths")
    with pytest.raises(ValueError, match=r"style must be one of plain, .*, got 'maths'"):
        evaluate_accuracy(model, tokenizer, [Example("a", answer="b")], style="maths")
    assert DEFAULT_TRIGGER == "the correct answer is "


def test_arithmetic_by_its_style_rule_and_decoding() -> None:
    tokenizer = make_tokenizer()
    examples = [
        Example("2 + 2 ?", output="2 + 2 = <<2+2=4>>4\n#### 4"),
        Example("3 + 3 ?", output="the last word of a model", answer="6.0"),
        Example("half of 3 ?", answer="1.5"),
        Example("which ?", answer="B"),
    ]
    asked = "\nAnswer the above question. First think step by step and then answer the final number.\n"
    said = {
        f"2 + 2 ?{asked}": "2 + 2 = <<2+2=4>>4\nThe final answer is:  4",
        f"3 + 3 ?{asked}": "3 and 3 are 6",
        f"half of 3 ?{asked}": "I do not know",
        f"which ?{asked}": "All have a hand, so The final answer is: B",
    }
    model = Scripted(tokenizer, said)
    result = evaluate_accuracy(
        model, tokenizer, examples, style="gsm8k", rule="gsm8k", **decoding_settings("gsm8k/sampling")
    )
    assert [(row.answer, row.gold, row.correct) for row in result.predictions] == [
        ("4", "4", True),
        ("6", "6.0", True),
        ("", "1.5", False),
        ("B", "B", True),
    ]
    assert (result.correct, result.total, result.unanswered) == (3, 4, 1)
    (call,) = model.calls
    wanted = {"do_sample": True, "max_new_tokens": 256, "temperature": 0.1, "top_p": 0.95, "top_k": 40}
    assert {name: call[name] for name in wanted} == wanted


def test_the_whole_length_may_be_bounded_instead_of_the_continuation() -> None:
    tokenizer = make_tokenizer()
    model = Scripted(tokenizer, {"red": "x"})
    generate_texts(model, tokenizer, ["red"], **decoding_settings("alpaca"))
    (call,) = model.calls
    assert "max_new_tokens" not in call
    assert (call["max_length"], call["no_repeat_ngram_size"], call["repetition_penalty"]) == (2048, 5, 1.1)
