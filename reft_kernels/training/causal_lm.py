"""The Trainers of causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from reft_kernels.model import ReftModel
from reft_kernels.training.data import SupervisedCollator, pad_token_id
from reft_kernels.training.frozen_cache import FrozenCache
from reft_kernels.training.frozen_rows import ROWS, SuffixCollator
from reft_kernels.training.packing import PackedCollator, check_packing
from reft_kernels.training.target_columns import COLUMNS, TargetColumns, takes_columns
from reft_kernels.training.trainer import ReftTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# accelerate's names of what keeps a part of the base model in each process.
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


class ReftTrainerForCausalLM(ReftTrainer):
    """Trains a ReftModel over a causal language model (pyreft `ReftTrainerForCausalLM`).

    As ReftTrainer, and

    - the loss is over the labelled tokens of the whole accumulated batch;
    - in training, logits are computed for the columns of a batch that predict a target and for no others, where the
      base model can do that (`logits_to_keep`); the loss is the same;
    - with PackedCollator, a base model that does not keep the examples of a row apart is refused.

    Arguments and errors are ReftTrainer's; `data_collator` is SupervisedCollator by default, if a tokenizer is given.

    Args:
        frozen_cache: a FrozenCache of the model: training and evaluation then run every row from its first edited token
            on, with the same loss. Logits, also those that `compute_loss_func` and `compute_metrics` see, are of these
            tokens, as the labels are.

    Raises ValueError where `frozen_cache` is another model's, or together with gradient checkpointing, torch.compile,
    NEFTune or a sharded base model.
    """

    def __init__(
        self,
        model: ReftModel,
        args: Any = None,
        data_collator: Any = None,
        *,
        frozen_cache: FrozenCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator, **kwargs)
        if isinstance(self.data_collator, PackedCollator):
            if frozen_cache is not None:
                raise ValueError("frozen_cache keeps examples apart, which PackedCollator joins: use one of the two")
            check_packing(model)
        self.frozen_cache = frozen_cache
        if frozen_cache is not None:
            if self._replays_steps:
                raise ValueError("frozen_cache looks each batch's rows up on the host, which step_graphs cannot")
            self._check_frozen_cache(frozen_cache, model)
            self.data_collator: Any = SuffixCollator(self.data_collator)
        if takes_columns(model.model):
            self.data_collator = TargetColumns(self.data_collator)

    def _default_collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return SupervisedCollator(pad_token_id(tokenizer))

    def _shifts_labels(self) -> bool:
        return not getattr(getattr(self._base, "config", None), "is_encoder_decoder", False)

    def _check_frozen_cache(self, frozen_cache: FrozenCache, model: ReftModel) -> None:
        if not isinstance(frozen_cache, FrozenCache):
            raise TypeError(f"frozen_cache must be a FrozenCache, got {type(frozen_cache).__name__}")
        if not frozen_cache.is_of(model):
            raise ValueError("frozen_cache must be made for the model that is trained")
        sharded = str(self.accelerator.distributed_type.value)
        for name, is_on in (
            ("gradient_checkpointing", self.args.gradient_checkpointing),
            ("torch_compile", self.args.torch_compile),
            ("neftune_noise_alpha", self.args.neftune_noise_alpha is not None),
            (sharded, sharded in _SHARDED),
        ):
            if is_on:
                raise ValueError(f"frozen_cache does not work together with {name}")

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
        if self.frozen_cache is None or ROWS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            states = self.frozen_cache.look_up(inputs)
        with self.frozen_cache.enter(states, inputs) as suffix:
            return super().compute_loss(model, suffix, return_outputs, num_items_in_batch)


class ReftTrainerForCausalLMDistributed(ReftTrainerForCausalLM):
    """ReftTrainerForCausalLM, which shards its data over the processes of a distributed launcher by itself: each
    batch is a part of the joined batch of one process, in an order that changes from epoch to epoch (pyreft
    `ReftTrainerForCausalLMDistributed`)."""
