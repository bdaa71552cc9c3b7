"""Answer rules: the text after a trigger, the last number, the first letter."""

from __future__ import annotations

import pytest

from reft_kernels.training.answers import (
    ANSWER_RULES,
    NumberOrLetter,
    TextAfterTrigger,
    answer_rule,
    first_letter,
    last_number,
    number_match,
)
from reft_kernels.training.decoding import DECODING, decoding_settings
from reft_kernels.training.prompts import PROMPT_STYLES


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 1,234,567.5 dollars", "1234567.5"),
        ("3 - 5 = -2", "-2"),
        ("5-3", "-3"),
        ("that is 42.", "42."),
        ("x = .5", "5"),
        ("none", ""),
        ("", ""),
        ("1\n2\n", "2"),
    ],
)
def test_last_number(text: str, wanted: str) -> None:
    assert last_number(text) == wanted


def test_first_letter() -> None:
    assert first_letter("the answer is C or D") == "C"
    assert first_letter("Answer: C") == "A"
    assert first_letter("f g") == ""


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("576", "576.0", True),
        ("42.", "42", True),
        ("0.3333", "0.3334", True),
        ("0.3333", "0.3350", False),
        ("1000", "1,000", True),
        ("", "0", False),
        ("inf", "inf", False),
        ("nan", "nan", False),
        ("B", "B", False),
    ],
)
def test_number_match(answer: str, gold: str, right: bool) -> None:
    assert number_match(answer, gold) == right


def test_arithmetic() -> None:
    rule = answer_rule("math")
    assert rule.gold("17.0", "a model's 12") == "17.0"
    assert rule.gold(None, "2 + 2 = <<2+2=4>>4\n#### 4") == "4"
    assert rule.gold("5 boxes\n#### 1,005", None) == "1,005"
    assert rule.gold(None, "Of these\n#### B") == "B"
    assert rule.gold(None, "it is 7 apples") == "7"
    assert rule.extract("1 + 1 = 2, so the answer is 2.", "2.0") == "2."
    assert rule.extract("1 + 1 = 2, so it is B", "C") == "B"
    assert rule.extract("no", "C") == ""
    assert rule.match("2.", "2.0")
    assert not rule.match("B", "C")
    assert rule.match("C", "C")
    assert not rule.match("", "C")


def test_gsm8k_looks_after_its_trigger_first() -> None:
    rule, plain = answer_rule("gsm8k"), answer_rule("math")
    text = "All of the Cakes are 12. The final answer is:  B"
    assert rule.extract(text, "B") == "B"
    assert plain.extract(text, "B") == "A"
    assert rule.extract(text, "12") == plain.extract(text, "12") == "12."
    assert rule.extract("12 Apples", "D") == "A"
    for said in ("2 then The final answer is:  4", "The final answer is: none, or 4", "The final answer is: 3. Or 4"):
        assert rule.extract(said, "4") == plain.extract(said, "4") == "4"


def test_text_after_the_trigger() -> None:
    rule = answer_rule("commonsense")
    assert rule.gold(None, "the correct answer is true") == "true"
    assert rule.gold("false", "the correct answer is true") == "false"
    assert rule.of_row(None) is rule.of_row("the correct answer is true") is rule
    whole = rule.of_row("red")
    assert (whole.gold(None, " red"), whole.extract(" red ", "red")) == ("red", "red")
    assert rule.extract("red", "red") == ""
    loose = TextAfterTrigger("=", match=lambda answer, gold: answer.lower() == gold.lower())
    assert loose.match(loose.extract("x = Red", "red"), "red")
    assert loose.of_row("no mark").match("RED", "red")


@pytest.mark.parametrize("rule", ANSWER_RULES.values(), ids=ANSWER_RULES)
def test_a_row_without_gold(rule: TextAfterTrigger | NumberOrLetter) -> None:
    with pytest.raises(ValueError, match="neither an answer nor an output"):
        rule.gold(None, None)
    if isinstance(rule, NumberOrLetter):
        with pytest.raises(ValueError, match="no number and no letter from A to E in 'it is so'"):
            rule.gold(None, "it is so")
        with pytest.raises(ValueError, match="no number and no letter from A to E in ''"):
            rule.gold("", None)


def test_names() -> None:
    with pytest.raises(ValueError, match="rule must be one of commonsense, math, gsm8k, got 'maths'"):
        answer_rule("maths")
    with pytest.raises(ValueError, match=r"decoding must be one of commonsense, .*, got 'maths'"):
        decoding_settings("maths")
    own = NumberOrLetter("=")
    assert answer_rule(own) is own
    assert set(ANSWER_RULES) < set(PROMPT_STYLES)
    assert {name.partition("/")[0] for name in DECODING} < set(PROMPT_STYLES)


def test_decoding_gives_copies() -> None:
    decoding_settings("math")["max_new_tokens"] = 1
    assert decoding_settings("math") == {"do_sample": False, "max_new_tokens": 512}
    assert decoding_settings("math/sampling") == {
        "do_sample": True,
        "num_beams": 4,
        "early_stopping": True,
        "max_new_tokens": 512,
        "temperature": 0.3,
        "top_p": 0.75,
        "top_k": 40,
    }
