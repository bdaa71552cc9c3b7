"""Memorisation: how much of a text a model says after its prompt, word for word (paper, appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from reft_kernels.training.data import encode_prompts
from reft_kernels.training.scoring import encode_targets, evaluating, target_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

By = Literal["generation", "teacher_forcing"]


@dataclass(frozen=True)
class Recital:
    """What was said in place of a target, both as token ids."""

    target: list[int]
    said: list[int]

    @property
    def length(self) -> int:
        """How many tokens are right before the first that is not (prefix exact match)."""
        pairs = zip(self.said, self.target, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def share(self) -> float:
        """`length` as a share of the target, in [0, 1]."""
        return self.length / len(self.target)


def recite(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str | Sequence[int],
    *,
    by: By = "generation",
) -> Recital:
    """What a model says after a prompt, its most likely token each time, against the target it should say.

    Args:
        model: a ReftModel, which edits its configured prompt positions, or a plain transformers model.
        prompt: for example "ALIC#ID1->".
        target: a text, tokenised after the prompt as in training; or token ids, for sequences that are no text.
        by: "generation" lets the model hear what it says itself. With "teacher_forcing" it hears the target: one
            pass, for `length` the same to rounding, since up to the first mistake both hear the same.

    Raises ValueError for a prompt or a target without tokens, an encoder-decoder, and another `by`.
    """
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {by!r}")
    if isinstance(target, str):
        ((whole, start),) = encode_targets(tokenizer, [prompt], [target])
    else:
        (start,) = encode_prompts(tokenizer, [prompt])
        whole = [*start, *target]
        if not start or len(whole) == len(start):
            raise ValueError(f"prompt and target must have tokens, got {len(start)} and {len(whole) - len(start)}")
    wanted = whole[len(start) :]
    with evaluating(model) as base:
        if by == "teacher_forcing":
            (logits,) = target_logits(model, base, [(whole, start)])
            return Recital(wanted, logits.argmax(-1).tolist())
        ids = torch.tensor([start], device=next(base.parameters()).device)
        # No end token: a target may hold one, and what comes after it counts as well.
        said: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(wanted),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return Recital(wanted, said[0, len(start) :].tolist())
