"""Accuracy by generation: greedy continuations of the prompts in left-padded batches, compared with gold.

The protocol is the paper's for commonsense reasoning (pyreft `compute_metrics`): at most 32 new tokens; the
answer is what follows the first occurrence of the trigger "the correct answer is ", stripped, and must equal
gold exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reft_kernels.training.data import DEFAULT_TEMPLATE, Example, build_prompt, encode_prompts, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TRIGGER = "the correct answer is "


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
    """`correct` of `total` examples; in `unanswered` of them the trigger is missing or nothing follows it.
    `predictions` are in the order of the examples."""

    correct: int
    total: int
    unanswered: int
    predictions: list[Prediction]

    @property
    def accuracy(self) -> float:
        """The fraction of correct answers, in [0, 1]."""
        return self.correct / self.total


def extract_answer(text: str, trigger: str = DEFAULT_TRIGGER) -> str:
    """The stripped text after the first `trigger`; "" where there is none. An empty trigger takes all."""
    return text.partition(trigger)[2].strip() if trigger else text.strip()


def exact_match(answer: str, gold: str) -> bool:
    """Whether the stripped texts are equal and not empty."""
    return answer.strip() == gold.strip() != ""


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    progress: bool = False,
    **generation: Any,
) -> list[str]:
    """Continuations of the prompts, without the prompts and without special tokens, in their order.

    Prompts are sorted by length, padded on the left, and generated greedily unless `generation` (keywords of
    transformers' `generate`, such as `do_sample=True, temperature=0.7`) says otherwise.

    Args:
        model: a ReftModel, which edits its configured prompt positions, or a plain transformers model.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: a prompt without tokens, or `batch_size` or `max_new_tokens` below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
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
                    max_new_tokens=max_new_tokens,
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
    template: str = DEFAULT_TEMPLATE,
    trigger: str = DEFAULT_TRIGGER,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    match: Callable[[str, str], bool] = exact_match,
    progress: bool = False,
) -> Accuracy:
    """Generates for every example and compares the answers with gold.

    Gold is the example's `answer`, else the answer in its `output`. An example whose `output` does not hold
    the trigger is judged on the whole generated text.

    Args:
        model: a ReftModel or a plain transformers model.
        template: see build_prompt.
        trigger: see extract_answer.
        match: says whether an answer counts as gold.

    Raises:
        ValueError: no examples, an example with neither `answer` nor `output`, or a bad template.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    golds: list[str] = []
    triggers: list[str] = []
    for index, example in enumerate(examples):
        triggers.append(trigger if example.output is None or trigger in example.output else "")
        if example.answer is not None:
            golds.append(example.answer)
        elif example.output is not None:
            golds.append(extract_answer(example.output, triggers[-1]))
        else:
            raise ValueError(f"example {index} has neither an answer nor an output")
    prompts = [build_prompt(example.instruction, example.input, template) for example in examples]
    texts = generate_texts(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    predictions = []
    for prompt, text, row_trigger, gold in zip(prompts, texts, triggers, golds, strict=True):
        answer = extract_answer(text, row_trigger)
        predictions.append(Prediction(prompt, text, answer, gold, match(answer, gold)))
    return Accuracy(
        correct=sum(prediction.correct for prediction in predictions),
        total=len(predictions),
        unanswered=sum(not prediction.answer for prediction in predictions),
        predictions=predictions,
    )
