"""What counts as the answer in a generated text, and whether it is right: the paper's rules, by name.

Source: pyreft `examples/loreft/compute_metrics.py`, which follows LLM-Adapters. A text here is what a model
generated, without the prompt.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

from reft_kernels.training.prompts import COMMONSENSE_TRIGGER, GSM8K_MARK, GSM8K_TRIGGER

DEFAULT_TRIGGER = COMMONSENSE_TRIGGER
NUMBER_TOLERANCE = 1e-3

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[A-E]")


def extract_answer(text: str, trigger: str = DEFAULT_TRIGGER) -> str:
    """The stripped text after the first `trigger`; "" where there is none. An empty trigger takes all."""
    return text.partition(trigger)[2].strip() if trigger else text.strip()


def exact_match(answer: str, gold: str) -> bool:
    """Whether the stripped texts are equal and not empty."""
    return answer.strip() == gold.strip() != ""


def last_number(text: str) -> str:
    """The last number of a text, written without commas; "" where there is none."""
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


def first_letter(text: str) -> str:
    """The first of the letters A to E, wherever it stands ("Answer: C" has A); "" where there is none."""
    found = _LETTER.search(text)
    return found[0] if found else ""


def number_match(answer: str, gold: str) -> bool:
    """Whether both are numbers, commas aside, that differ by at most 1e-3."""
    found, wanted = _as_number(answer), _as_number(gold)
    return found is not None and wanted is not None and abs(found - wanted) <= NUMBER_TOLERANCE


def _as_number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class AnswerRule(ABC):
    """How a generated text is judged: `gold` of the row, then `extract` from the text, then `match`."""

    @abstractmethod
    def gold(self, answer: str | None, output: str | None) -> str:
        """The right answer of a row: from its `answer`, or from its `output` where there is none.

        Raises ValueError where neither holds one.
        """

    @abstractmethod
    def extract(self, text: str, gold: str) -> str:
        """The answer in a generated text, "" where there is none. `gold` says what kind of answer it is."""

    @abstractmethod
    def match(self, answer: str, gold: str) -> bool:
        """Whether the answer is right."""

    def of_row(self, output: str | None) -> AnswerRule:
        """The rule for a row with this output."""
        del output
        return self


class TextAfterTrigger(AnswerRule):
    """The text that follows the first `trigger`, exactly (commonsense reasoning).

    A row whose output does not hold the trigger is judged on the whole text. `match` compares the answer with gold.
    """

    def __init__(self, trigger: str = DEFAULT_TRIGGER, match: Callable[[str, str], bool] = exact_match) -> None:
        self.trigger = trigger
        self._match = match

    def gold(self, answer: str | None, output: str | None) -> str:
        """`answer` as it stands, else the answer in `output`."""
        if answer is not None:
            return answer
        return extract_answer(_given(output), self.trigger)

    def extract(self, text: str, gold: str) -> str:
        """See `extract_answer`."""
        del gold
        return extract_answer(text, self.trigger)

    def match(self, answer: str, gold: str) -> bool:
        """See `exact_match`."""
        return self._match(answer, gold)

    def of_row(self, output: str | None) -> AnswerRule:
        """This rule, or one without a trigger where the output has none."""
        return self if output is None or self.trigger in output else TextAfterTrigger("", self._match)


class NumberOrLetter(AnswerRule):
    """The last number of the text where gold is a number, else the first letter from A to E (arithmetic reasoning).

    Numbers are read without commas and may differ by 1e-3; letters are equal.

    Args:
        trigger: look after it first, and in the whole text where it is missing or followed by nothing that fits. A
            number is the same either way; it saves the letter of a working that is full of capitals.

    Gold is what follows the last `####` of the row's `answer`, or of its `output`.
    """

    def __init__(self, trigger: str = "") -> None:
        self.trigger = trigger

    def gold(self, answer: str | None, output: str | None) -> str:
        """The row's own answer, else the last number in its output, else the first letter there."""
        text = (_given(output) if answer is None else answer).rpartition(GSM8K_MARK)[2].strip()
        if answer is None and _as_number(text) is None:
            text = last_number(text) or first_letter(text)
        if not text:
            raise ValueError(f"no number and no letter from A to E in {output if answer is None else answer!r}")
        return text

    def extract(self, text: str, gold: str) -> str:
        """A number, written without commas, or a letter."""
        find = last_number if _as_number(gold) is not None else first_letter
        return (find(extract_answer(text, self.trigger)) if self.trigger else "") or find(text)

    def match(self, answer: str, gold: str) -> bool:
        """See `number_match` and `exact_match`."""
        return number_match(answer, gold) if _as_number(gold) is not None else exact_match(answer, gold)


def _given(output: str | None) -> str:
    if output is None:
        raise ValueError("neither an answer nor an output")
    return output


ANSWER_RULES: Mapping[str, AnswerRule] = MappingProxyType(
    {
        "commonsense": TextAfterTrigger(),
        "math": NumberOrLetter(),
        "gsm8k": NumberOrLetter(GSM8K_TRIGGER.strip()),
    }
)
"""The rules by the name of the prompt style that they belong to."""


def answer_rule(rule: str | AnswerRule) -> AnswerRule:
    """The rule of a name; a rule is returned as it is. Raises ValueError for an unknown name."""
    if isinstance(rule, AnswerRule):
        return rule
    if rule not in ANSWER_RULES:
        raise ValueError(f"rule must be one of {', '.join(ANSWER_RULES)}, got {rule!r}")
    return ANSWER_RULES[rule]
