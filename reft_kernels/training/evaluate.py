"""Accuracy by generation: continuations of the prompts in left-padded batches, compared with gold.

The protocol is the paper's (pyreft `compute_metrics`), by default for commonsense reasoning: at most 32 new tokens,
greedily; the answer is what follows the first occurrence of the trigger "the correct answer is ", stripped, and must
equal gold exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft_kernels.training.answers import DEFAULT_TRIGGER, AnswerRule, TextAfterTrigger, answer_rule, exact_match
from reft_kernels.training.data import DEFAULT_TEMPLATE, Example, encode_prompts, pad_token_id
from reft_kernels.training.prompts import PromptStyle, prompt_and_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 32


@dataclass(frozen=True)
class Prediction:
    """What was generated for one example: `text`, the `answer` in it, `gold`, and whether they agree."""

    prompt: str
    text: str
    answer: str
    gold: str
    correct: bool


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` examples; in `unanswered` of them the text holds no answer.
    `predictions` are in the order of the examples."""

    correct: int
    total: int
    unanswered: int
    predictions: list[Prediction]

    @property
    def accuracy(self) -> float:
        """The fraction of correct answers, in [0, 1]."""
        return self.correct / self.total


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: bool = False,
    **generation: Any,
) -> list[str]:
    """Continuations of the prompts, without the prompts and without special tokens, in their order.

    Prompts are sorted by length, padded on the left, and generated greedily unless `generation` (keywords of
    transformers' `generate`, such as `do_sample=True, temperature=0.7`) says otherwise.

    Args:
        model: a ReftModel, which edits its configured prompt positions, or a plain transformers model.
        max_new_tokens: the longest continuation; 32 where neither it nor `max_length` is given.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: a prompt without tokens, or `batch_size` or `max_new_tokens` below 1.
    """
    if max_new_tokens is None and generation.get("max_length") is None:
        max_new_tokens = DEFAULT_NEW_TOKENS
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_new_tokens is not None:
        generation["max_new_tokens"] = max_new_tokens
    encoded = encode_prompts(tokenizer, prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompt has no tokens: {prompt!r}")
    if not generation.get("do_sample", False):
        generation = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **generation}
    base = getattr(model, "model", model) if hasattr(model, "interventions") else model
    generation = {
        "eos_token_id": _stop_ids(base, tokenizer),
        "pad_token_id": pad_token_id(tokenizer),
        **generation,
    }
    device = next(base.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _bar(len(prompts), progress) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                width = len(encoded[chosen[0]])
                fill = pad_token_id(tokenizer)
                gaps = [width - len(encoded[index]) for index in chosen]
                padded = [[fill] * gap + encoded[index] for gap, index in zip(gaps, chosen, strict=True)]
                mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
                sequences = model.generate(  # type: ignore[operator]
                    input_ids=torch.tensor(padded, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    **generation,
                )
                decoded = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
                for index, text in zip(chosen, decoded, strict=True):
                    texts[index] = text
                bar.update(len(chosen))
    finally:
        model.train(training)
    return texts


def _bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="prompt", disable=not show)


def _stop_ids(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The model's own end tokens and the tokenizer's, which is the one that training appends."""
    ids: Any = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    stop = set(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        stop.add(tokenizer.eos_token_id)
    return sorted(stop) or None


def evaluate_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: str | None = None,
    trigger: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    match: Callable[[str, str], bool] | None = None,
    progress: bool = False,
    style: str | PromptStyle | None = None,
    rule: str | AnswerRule | None = None,
    **generation: Any,
) -> Accuracy:
    """Generates for every example and compares the answers with gold.

    Gold is the example's `answer`, else the answer in its `output`. Where the answer is what follows a trigger, an
    example whose `output` does not hold the trigger is judged on the whole generated text.

    Args:
        model: a ReftModel or a plain transformers model.
        template: the prompt, see build_prompt. By default the paper's for commonsense reasoning.
        style: instead of a template, a style of prompts.py by name, such as "gsm8k".
        trigger: what the answer follows, see extract_answer. By default "the correct answer is ".
        match: says whether an answer counts as gold; by default exact_match.
        rule: instead of trigger and match, a rule of answers.py by name, such as "math".
        batch_size, max_new_tokens, progress, **generation: see generate_texts. The paper's settings are in decoding.py.

    Raises:
        ValueError: no examples, an example with neither `answer` nor `output`, a bad template, an unknown style or
            rule, or two arguments of which one is to be instead of the other.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    if style is None:
        style = PromptStyle(DEFAULT_TEMPLATE if template is None else template)
    elif template is not None:
        raise ValueError(f"give template or style, not both (got template={template!r} and style={style!r})")
    if rule is None:
        rule = TextAfterTrigger(
            DEFAULT_TRIGGER if trigger is None else trigger, exact_match if match is None else match
        )
    elif trigger is not None or match is not None:
        raise ValueError(f"give rule, or trigger and match, not both (got rule={rule!r})")
    rule = answer_rule(rule)
    rules: list[AnswerRule] = []
    golds: list[str] = []
    for index, example in enumerate(examples):
        rules.append(rule.of_row(example.output))
        try:
            golds.append(rules[-1].gold(example.answer, example.output))
        except ValueError as error:
            raise ValueError(f"example {index} has no gold answer: {error}") from None
    prompts = [
        prompt_and_target(example.instruction, example.input, style=style, tokenizer=tokenizer)[0]
        for example in examples
    ]
    texts = generate_texts(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
        **generation,
    )
    predictions = []
    for prompt, text, row_rule, gold in zip(prompts, texts, rules, golds, strict=True):
        answer = row_rule.extract(text, gold)
        predictions.append(Prediction(prompt, text, answer, gold, row_rule.match(answer, gold)))
    return Accuracy(
        correct=sum(prediction.correct for prediction in predictions),
        total=len(predictions),
        unanswered=sum(not prediction.answer for prediction in predictions),
        predictions=predictions,
    )
