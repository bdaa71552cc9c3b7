"""The Trainers of causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft_kernels.model import ReftModel
from reft_kernels.training.data import SupervisedCollator, pad_token_id
from reft_kernels.training.packing import PackedCollator, check_packing
from reft_kernels.training.target_columns import COLUMNS, TargetColumns, takes_columns
from reft_kernels.training.trainer import ReftTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReftTrainerForCausalLM(ReftTrainer):
    """Trains a ReftModel over a causal language model (pyreft `ReftTrainerForCausalLM`).

    As ReftTrainer, and

    - the loss is over the labelled tokens of the whole accumulated batch;
    - in training, logits are computed for the columns of a batch that predict a target and for no others, where the
      base model can do that (`logits_to_keep`); the loss is the same;
    - with PackedCollator, a base model that does not keep the examples of a row apart is refused.

    Arguments and errors are ReftTrainer's; `data_collator` is SupervisedCollator by default, if a tokenizer is given.
    """

    def __init__(self, model: ReftModel, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, data_collator, **kwargs)
        if isinstance(self.data_collator, PackedCollator):
            check_packing(model)
        if takes_columns(model.model):
            self.data_collator: Any = TargetColumns(self.data_collator)

    def _default_collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return SupervisedCollator(pad_token_id(tokenizer))

    def _shifts_labels(self) -> bool:
        return not getattr(getattr(self._base, "config", None), "is_encoder_decoder", False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See ReftTrainer.compute_loss."""
        inputs = dict(inputs)
        columns = inputs.pop(COLUMNS, None)
        own_loss = self.compute_loss_func is None and self.label_smoother is None and not return_outputs
        if columns is not None and own_loss and model.training:
            inputs["logits_to_keep"] = columns
            inputs["shift_labels"] = inputs["labels"][:, 1:].index_select(1, columns)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class ReftTrainerForCausalLMDistributed(ReftTrainerForCausalLM):
    """ReftTrainerForCausalLM, which shards its data over the processes of a distributed launcher by itself: each
    batch is a part of the joined batch of one process, in an order that changes from epoch to epoch (pyreft
    `ReftTrainerForCausalLMDistributed`)."""
