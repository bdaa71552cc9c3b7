"""Accuracy by likelihood: which of a row's answers the model finds most likely, for models that cannot write one.

What is compared is log p(target | prompt) of every choice, the target being the text that training would learn for it
("the correct answer is true"). Edits are at the positions of the prompt, as in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reft_kernels.training.answers import AnswerRule, answer_rule
from reft_kernels.training.data import Example
from reft_kernels.training.evaluate import Accuracy, Prediction
from reft_kernels.training.prompts import PromptStyle, prompt_and_target
from reft_kernels.training.scoring import (
    edited,
    encode_targets,
    evaluating,
    padded,
    takes,
    target_logits,
    token_log_probs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Normalise = Literal["none", "token", "byte"]

_FORMAT = re.compile(r"Answer format:\s*(\S+/\S+)\s*$")


class Score(NamedTuple):
    """`log_prob`: the sum of log p over the `tokens` tokens of a target; `bytes`: the length of its text in UTF-8."""

    log_prob: float
    tokens: int
    bytes: int

    def normalised(self, by: Normalise = "none") -> float:
        """The sum, its mean over the tokens, or its share of a byte."""
        return self.log_prob / {"none": 1, "token": self.tokens, "byte": self.bytes}[by]


@dataclass(frozen=True)
class ChoicePrediction(Prediction):
    """A Prediction whose `text` is the most likely target and whose `answer` is its choice; `scores` are those of
    `choices`, in their order."""

    choices: tuple[str, ...]
    scores: tuple[Score, ...]


def answer_choices(instruction: str) -> list[str]:
    """The choices that an instruction of the commonsense sets ends with, such as "Answer format: true/false".

    Raises ValueError where it ends otherwise.
    """
    found = _FORMAT.search(instruction)
    if found is None:
        raise ValueError(f"expected 'Answer format: A/B' at the end of the instruction, got {instruction[-60:]!r}")
    return found[1].split("/")


def evaluate_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    choices: Sequence[Sequence[str]] | None = None,
    style: str | PromptStyle = "commonsense",
    rule: str | AnswerRule = "commonsense",
    normalise: Normalise = "none",
    batch_size: int = 16,
    share_prompt: bool = True,
    progress: bool = False,
) -> Accuracy:
    """The share of the examples whose right answer is the most likely of its choices; of equal ones the first counts.

    Args:
        choices: the answers to choose from, of each example; by default those that its instruction ends with, see
            `answer_choices`.
        style: makes prompt and target, see `prompt_and_target`.
        rule: finds gold and says whether the choice equals it, see answers.py.
        normalise: compare sums of log p ("none"), their means over the tokens ("token") or over the bytes of the
            target ("byte"), where choices differ in length.
        model, tokenizer, batch_size, share_prompt, progress: see `score_choices`.

    Returns an Accuracy whose predictions are ChoicePredictions; nothing is ever unanswered.

    Raises ValueError for no examples, an example without choices or gold, or whose gold is none of its choices, and
    for an unknown name.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise must be one of {', '.join(get_args(Normalise))}, got {normalise!r}")
    if choices is None:
        choices = [answer_choices(example.instruction) for example in examples]
    if len(choices) != len(examples):
        raise ValueError(f"expected choices for each of {len(examples)} examples, got {len(choices)}")
    rule = answer_rule(rule)
    golds, prompts, targets = [], [], []
    for index, (example, offered) in enumerate(zip(examples, choices, strict=True)):
        gold = rule.of_row(example.output).gold(example.answer, example.output)
        if not any(rule.match(choice, gold) for choice in offered):
            raise ValueError(f"example {index}: the answer {gold!r} is none of its choices {', '.join(offered)}")
        made = [
            prompt_and_target(example.instruction, example.input, choice, style=style, tokenizer=tokenizer)
            for choice in offered
        ]
        golds.append(gold)
        prompts.append(made[0][0])
        targets.append([str(target) for _, target in made])
    scores = score_choices(
        model,
        tokenizer,
        prompts,
        targets,
        batch_size=batch_size,
        share_prompt=share_prompt,
        progress=progress,
    )
    predictions: list[Prediction] = []
    for prompt, texts, offered, gold, found in zip(prompts, targets, choices, golds, scores, strict=True):
        best = max(range(len(found)), key=lambda k: found[k].normalised(normalise))
        right = rule.match(offered[best], gold)
        predictions.append(
            ChoicePrediction(prompt, texts[best], offered[best], gold, right, tuple(offered), tuple(found))
        )
    return Accuracy(sum(row.correct for row in predictions), len(predictions), 0, predictions)


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    share_prompt: bool = True,
    progress: bool = False,
) -> list[list[Score]]:
    """log p(target | prompt) for all targets of every prompt, in their order.

    Prompt and target are tokenised as in training. Sequences of about equal length are scored together.

    Args:
        model: a ReftModel over a decoder, whose edits are those of the prompt (an intervention without positions edits
            every token), or a plain transformers model.
        batch_size: how many targets at once.
        share_prompt: run a prompt once for all of its targets, which then continue its keys and values. The result is
            the same to rounding. A prompt whose last token grows together with a target's first is run with each.
        progress: show a progress bar on standard error.

    Raises ValueError for prompts and targets that differ in number, a prompt without targets or without tokens, a
    target without tokens, an encoder-decoder, and `batch_size` below 1.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"expected targets for each of {len(prompts)} prompts, got {len(targets)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for index, texts in enumerate(targets):
        if not texts:
            raise ValueError(f"prompt {index} has no targets")
    flat = [text for texts in targets for text in texts]
    repeated = [prompt for prompt, texts in zip(prompts, targets, strict=True) for _ in texts]
    rows = encode_targets(tokenizer, repeated, flat)
    ends = accumulate(map(len, targets))
    groups = [range(end - len(texts), end) for end, texts in zip(ends, targets, strict=True)]
    alone: list[range] = []
    shared: list[range] = []
    for group in groups:
        starts_alike = all(rows[k][0][: len(rows[k][1])] == rows[k][1] for k in group)
        if share_prompt and starts_alike:
            shared.append(group)
        else:
            alone.extend(range(k, k + 1) for k in group)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with evaluating(model) as base, _bar(len(rows), progress) as bar:
        for run, parts in ((_alone, alone), (_shared, shared)):
            for batch in _batches(parts, rows, batch_size):
                taken = [[rows[k] for k in group] for group in batch]
                for k, log_probs in zip((k for group in batch for k in group), run(model, base, taken), strict=True):
                    found[k] = log_probs
                bar.update(sum(map(len, batch)))
        sums = [float(log_probs.sum()) for log_probs in found]
    return [[Score(sums[k], len(found[k]), len(flat[k].encode())) for k in group] for group in groups]


Row = tuple[list[int], list[int]]


def _batches(groups: list[range], rows: Sequence[Row], size: int) -> Iterator[list[range]]:
    """Groups of about equal length, the longest first, with at most `size` rows together, or one larger group."""
    batch: list[range] = []
    for group in sorted(groups, key=lambda group: -max(len(rows[k][0]) for k in group)):
        if batch and sum(map(len, batch)) + len(group) > size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _alone(model: nn.Module, base: nn.Module, batch: list[list[Row]]) -> list[Tensor]:
    """log p of the target's tokens of each row, each with its own prompt."""
    rows = [row for group in batch for row in group]
    logits = target_logits(model, base, rows)
    return [token_log_probs(one, whole[len(prompt) :]) for one, (whole, prompt) in zip(logits, rows, strict=True)]


def _shared(model: nn.Module, base: nn.Module, batch: list[list[Row]]) -> list[Tensor]:
    """The same, the prompt of each group run once. Prompts are padded on the left, so that targets follow at once."""
    device = next(base.parameters()).device
    prompts = [group[0][1] for group in batch]
    targets = [whole[len(prompt) :] for group in batch for whole, prompt in group]
    owner = torch.tensor([k for k, group in enumerate(batch) for _ in group], device=device)
    mask = padded([[1] * len(prompt) for prompt in prompts], 0, device, left=True)
    inputs: dict[str, Any] = {"input_ids": padded(prompts, 0, device, left=True), "attention_mask": mask}
    last = {"logits_to_keep": 1} if takes(base, "logits_to_keep") else {}
    with edited(model, inputs):
        output = base(**inputs, **_position_ids(base, mask), **last, use_cache=True)
    first = output.logits[:, -1].index_select(0, owner)  # [M, V]
    longest = max(map(len, targets))
    if longest == 1:
        return [token_log_probs(row[None], target) for row, target in zip(first, targets, strict=True)]

    cache = output.past_key_values
    _check_cache(cache, base)
    cache.batch_select_indices(owner)
    # The last token of a target predicts nothing that is asked for.
    fed = padded([target[:-1] for target in targets], 0, device)
    attended = padded([[1] * (len(target) - 1) for target in targets], 0, device)
    mask = torch.cat([mask.index_select(0, owner), attended], dim=1)
    inputs = {"input_ids": fed, "attention_mask": mask, "past_key_values": cache}
    positions = _position_ids(base, mask, fed.shape[1])
    # With a label on every token none of them is prompt.
    with edited(model, {**inputs, "labels": torch.zeros_like(fed)}):
        rest = base(**inputs, **positions, use_cache=True).logits  # [M, T - 1, V]
    logits = torch.cat([first[:, None], rest], dim=1)
    return [token_log_probs(row[: len(target)], target) for row, target in zip(logits, targets, strict=True)]


def _check_cache(cache: Any, base: nn.Module) -> None:
    """Raises ValueError for a cache that holds anything but the keys and values of each token."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(
            f"share_prompt=True needs a cache of keys and values, {type(base).__name__} has "
            f"{', '.join(kind.__name__ for kind in kinds) or type(cache).__name__}: pass share_prompt=False"
        )


def _position_ids(base: nn.Module, mask: Tensor, count: int | None = None) -> dict[str, Tensor]:
    """Positions within each row, padding aside, of the last `count` columns, for a model that takes them."""
    if not takes(base, "position_ids"):
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"position_ids": positions if count is None else positions[:, -count:]}


def _bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="choice", disable=not show)
