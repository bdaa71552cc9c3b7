"""Multiple choice as a question and the text of its answer, for models too small to bind an answer to its number.

A row of the commonsense sets in LLM-Adapters' form names its options ("Answer1: red Answer2: blue ... Answer format:
answer1/answer2") and asks for a name. Here the question alone is the prompt and an option's text follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reft_kernels.training.choices import answer_choices
from reft_kernels.training.data import Example


@dataclass(frozen=True)
class ClozeExample(Example):
    """`instruction` is the question, `output` and `answer` the text of the right option, `choices` those of all."""

    choices: tuple[str, ...] = ()


def as_cloze(example: Example) -> ClozeExample:
    """The question of a row, and its options as texts; options that are words themselves (true/false) stay.

    Raises ValueError where the row's instruction is not in LLM-Adapters' form, or its answer is none of its options.
    """
    names = answer_choices(example.instruction)
    body = example.instruction[: example.instruction.rindex("Answer format:")].rstrip()
    _, colon, body = body.partition(": ")
    if not colon:
        raise ValueError(f"expected a question after a colon, got {example.instruction[:60]!r}")
    starts = [body.find(f"{name[0].upper()}{name[1:]}:") for name in names]
    if -1 in starts:
        question, options = body, names
    else:
        if starts != sorted(starts):
            raise ValueError(f"the options {', '.join(names)} are not in order in {example.instruction[:60]!r}")
        ends = [*starts[1:], len(body)]
        question = body[: starts[0]]
        options = [
            body[start + len(name) + 1 : end].strip() for name, start, end in zip(names, starts, ends, strict=True)
        ]
    answer = example.answer if example.answer is not None else (example.output or "").rpartition(" ")[2]
    if answer.strip() not in names:
        raise ValueError(f"the answer {answer!r} is none of the options {', '.join(names)}")
    right = options[names.index(answer.strip())]
    question = re.sub(r"\s+", " ", question).strip()
    return ClozeExample(question, output=right, answer=right, subspaces=example.subspaces, choices=tuple(options))
