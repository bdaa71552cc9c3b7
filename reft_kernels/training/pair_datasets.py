"""pyreft's data sets of two texts, one of which is the better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.training.data import pad_token_id
from reft_kernels.training.item_layout import IGNORE_INDEX
from reft_kernels.training.pyreft_datasets import MASK, ReftDataset, keyword
from reft_kernels.training.task_datasets import alpaca_prompt
from reft_kernels.training.tokens import end_token, starts_by_itself, token_ids


class ReftPreferenceDataset(ReftDataset):
    """Instructions with a chosen and a rejected answer: the edit is to turn the rejected into the chosen one (pyreft
    `ReftPreferenceDataset`).

    `input_ids` are the prompt with the rejected answer, `labels` at the same columns the chosen one. The shorter of
    the two is filled up to the length of the longer, `input_ids` with masked padding. Other splits than "train" have
    the prompt alone. The prompts are Alpaca's.

    Arguments, items and `pyreft_compat` are ReftDataset's. Further keywords: `instruction_field`, `input_field`,
    `chosen_output_field` and `rejected_output_field`, the names of the rows' fields.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Reads the names of the fields."""
        self.input_field = keyword(kwargs, "input_field")
        self.instruction_field = keyword(kwargs, "instruction_field")
        self.chosen_output_field = keyword(kwargs, "chosen_output_field")
        self.rejected_output_field = keyword(kwargs, "rejected_output_field")

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Prompt and rejected answer as input, the chosen answer as labels."""
        prompt = alpaca_prompt(data_item, self.instruction_field, self.input_field, self.pyreft_compat)
        prompt_ids = self._ids(prompt)
        length = len(prompt_ids)
        if self.data_split != "train":
            return {"input_ids": prompt_ids}, length
        end = end_token(self.tokenizer)
        input_ids = self._ids(prompt + data_item[self.rejected_output_field] + end)
        labels = self._ids(prompt + data_item[self.chosen_output_field] + end)
        labels[:length] = IGNORE_INDEX
        width = max(len(input_ids), len(labels))
        result = {
            "input_ids": _filled(input_ids, width, pad_token_id(self.tokenizer)),
            "labels": _filled(labels, width, IGNORE_INDEX),
            MASK: _filled(torch.ones(len(input_ids), dtype=torch.int32), width, 0),
        }
        return result, length


def _filled(row: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, width - len(row)), value=value)


class ReftRewardDataset(ReftDataset):
    """Two conversations with the same beginning, for a reward model (pyreft `ReftRewardDataset`).

    The prompt is what both have in common, token by token. Items have `chosen_output` and `rejected_output`, int64,
    their masks `chosen_output_mask` and `rejected_output_mask`, one `intervention_locations` for both, and
    `chosen_reward` and `rejected_reward` where the rows have rewards; the better one is the chosen. ReftRewardCollator
    makes batches of them. Texts come from the tokenizer's chat template.

    Arguments and `pyreft_compat` are ReftDataset's. Further keywords, names of the rows' fields: `conv_A_field` and
    `conv_B_field`, each a list of messages, or with `prompt_field` the answer to that prompt; `conv_A_reward_field` and
    `conv_B_reward_field`, both or neither (A is the chosen one then). The rows themselves stay as they are.

    With `pyreft_compat` every start token in a text is taken out, not just the leading one that the tokenizer puts
    there itself, and the last common token is lost where one text continues the other.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Reads the names of the fields."""
        self.conv_A_field = keyword(kwargs, "conv_A_field")
        self.conv_B_field = keyword(kwargs, "conv_B_field")
        self.prompt_field = kwargs.get("prompt_field")
        self.conv_A_reward_field = kwargs.get("conv_A_reward_field")
        self.conv_B_reward_field = kwargs.get("conv_B_reward_field")
        if (self.conv_A_reward_field is None) != (self.conv_B_reward_field is None):
            raise TypeError("give conv_A_reward_field and conv_B_reward_field both, or neither")
        self.fields_to_pad = ["chosen_output", "rejected_output"]
        self.fields_to_mask = ["chosen_output", "rejected_output"]

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        """Both conversations and their rewards."""
        result: dict[str, Any] = {}
        chosen, rejected = (self._text(data_item, field) for field in (self.conv_A_field, self.conv_B_field))
        if self.conv_A_reward_field is not None:
            rewards = data_item[self.conv_A_reward_field], data_item[self.conv_B_reward_field]
            if rewards[0] < rewards[1]:
                chosen, rejected, rewards = rejected, chosen, rewards[::-1]
            result["chosen_reward"], result["rejected_reward"] = rewards
        chosen_ids, rejected_ids = (token_ids(self.tokenizer, text, keep_end=True) for text in (chosen, rejected))
        result["chosen_output"], result["rejected_output"] = chosen_ids, rejected_ids
        width = min(len(chosen_ids), len(rejected_ids))
        common = int((chosen_ids[:width] == rejected_ids[:width]).cumprod(0).sum())
        return result, min(common, width - 1) if self.pyreft_compat else common

    def _text(self, data_item: Any, field: str) -> str:
        messages = data_item[field]
        if self.prompt_field is not None:
            messages = [
                {"role": "user", "content": data_item[self.prompt_field]},
                {"role": "assistant", "content": messages},
            ]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        bos = self.tokenizer.bos_token
        if self.pyreft_compat:
            return text.replace(bos, "")
        return text.removeprefix(bos) if bos is not None and starts_by_itself(self.tokenizer) else text
