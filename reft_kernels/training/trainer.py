"""transformers' Trainer for a ReftModel: the adapter alone is trained, saved and resumed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import can_return_loss, find_labels

from reft_kernels.checkpoint import BASE_FILE, load_base_tensors
from reft_kernels.model import ReftModel
from reft_kernels.modules import inner_model
from reft_kernels.stiefel import StiefelParameter
from reft_kernels.stiefel_adamw import StiefelAdamW
from reft_kernels.training.checkpoints import last_complete_checkpoint, save_beside
from reft_kernels.training.collators import LOCATIONS, SUBSPACES, ReftDataCollator
from reft_kernels.training.length_groups import LengthGroups, groups_by_length
from reft_kernels.training.log_values import LogValues
from reft_kernels.training.sharding import save_optimizer, save_together, taking_whole_tensors
from reft_kernels.training.split_models import surplus_of_loss, tensor_parallel_size
from reft_kernels.training.step_graph_checks import check_step_graphs
from reft_kernels.training.step_graphs import StepGraphs, cuda_capture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADAMW = ("adamw_torch", "adamw_torch_fused")
# What pyreft's data sets number their rows with.
_ROW = "id"
# Beside the inputs of a model, in the batch of a step graph.
_ITEMS, _MICRO_BATCHES = "reft_kernels.items", "reft_kernels.micro_batches"


class ReftTrainer(Trainer):  # type: ignore[misc,unused-ignore]
    """Trains a ReftModel over a model of any kind that returns a loss (pyreft `ReftTrainer`).

    Everything of transformers' Trainer holds: arguments, callbacks, progress bar, evaluation, sharding over
    processes, checkpoints, resuming and the best model at the end. The differences:

    - A checkpoint, and `save_model`, hold the adapter (`reft_model.save`) and nothing of the base model, except
      parameters of it that are trained too (LoRA, a classifier head). `ReftModel.load` reads them. An adapter
      that is in the folder already is replaced.
    - The loss is the base model's own; inputs of the batch go to it by their names.
    - `intervention_locations` [B, I, P] and `subspaces` [B, I, k] of the batch reach the model, also with
      `remove_unused_columns=True`; `id` does not. A model without interventions (LoRA alone) needs no locations, and
      those it gets have no effect.
    - Weight decay applies to the learned matrices W (and P of the classes without orthonormal rows), not to
      biases and not to R, whose rows stay orthonormal. (In pyreft weight decay reaches no parameter at all.)
    - Where R itself is a parameter (`orthogonality="polar"`), AdamW is `StiefelAdamW`, which keeps its rows
      orthonormal.
    - Batches of examples of one length (`length_grouping()` as arguments) are made from the data set's `lengths`, where
      it has them, without going through it; their order follows from seed and epoch, also after resuming.
    - Values of callbacks that are LogValues (Throughput, Orthonormality) are part of every training log.
    - Several visible GPUs without a distributed launcher are not split with DataParallel; the first is used.

    Args:
        model: a ReftModel.
        args: TrainingArguments.
        data_collator: by default, if a tokenizer is given, one that pads with it and keeps locations.
        tokenizer: used for the default collator only: the base model's special tokens stay as they are, and
            checkpoints hold no tokenizer. `processing_class` is its name in newer versions of transformers.
        pyreft_compat: decay no parameter, whatever `weight_decay` says.
        step_graphs: run forward and backward as one CUDA graph for each shape of batch that comes again; see
            StepGraphs.
        **kwargs: Trainer's other arguments.

    Raises:
        TypeError: `model` is no ReftModel.
        ValueError: both `tokenizer` and `processing_class` are given; or `step_graphs` on another device than a CUDA
            device, with transformers 4, or together with what it does not go with (`check_step_graphs`).
    """

    def __init__(
        self,
        model: ReftModel,
        args: Any = None,
        data_collator: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        pyreft_compat: bool = False,
        step_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, ReftModel):
            raise TypeError(f"model must be a ReftModel (see get_reft_model), got {type(model).__name__}")
        if tokenizer is not None and processing_class is not None:
            raise ValueError("tokenizer and processing_class are two names of one argument; give one of them")
        tokenizer = tokenizer if tokenizer is not None else processing_class
        if data_collator is None and tokenizer is not None:
            data_collator = self._default_collator(tokenizer)
        if args is not None and args.n_gpu > 1:
            args._n_gpu = 1
        if args is not None and isinstance(kwargs.get("train_dataset"), IterableDataset):
            _read_in_every_process(args)
        self.pyreft_compat = pyreft_compat
        self._base = inner_model(model.model)
        self._base_inputs = tuple(inspect.signature(self._base.forward).parameters)
        self._edits = len(model.interventions) > 0
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.args.label_names is None:
            self.label_names: list[str] = find_labels(type(self._base))
        self.can_return_loss: bool = can_return_loss(type(self._base))
        self._loss_shifts_labels = self._shifts_labels()
        self.step_graphs: StepGraphs | None = None
        self._replays_steps = step_graphs
        if step_graphs:
            check_step_graphs(self.args, self._base)
            cuda_capture(self.args.device)  # raises where there is no such device

    def _default_collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        return ReftDataCollator(DataCollatorWithPadding(tokenizer))

    def _shifts_labels(self) -> bool:
        """Whether the label of a column is predicted by the column before, so that the first never counts."""
        encoder_decoder = getattr(getattr(self._base, "config", None), "is_encoder_decoder", False)
        return LOSS_MAPPING.get(getattr(self._base, "loss_type", None)) is ForCausalLMLoss and not encoder_decoder

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns
        self._signature_columns: list[str] = list(dict.fromkeys([*known, *self._base_inputs]))

    def _model_inputs(self, batch: Any) -> dict[str, Any]:
        """A batch as keywords of the ReftModel; the same again for what is that already."""
        inputs = dict(batch)
        inputs.pop(_ROW, None)
        if not self._edits:
            inputs.pop(LOCATIONS, None)
            inputs.pop(SUBSPACES, None)
        if isinstance(inputs.get(SUBSPACES), Tensor):
            inputs[SUBSPACES] = list(inputs[SUBSPACES].unbind(1))
        if "use_cache" in self._base_inputs:
            inputs.setdefault("use_cache", False)
        return inputs

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer's; batches of one length are made from the lengths that the data set knows."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if lengths is None or not groups_by_length(self.args):
            return super()._get_train_sampler(*([] if train_dataset is None else [train_dataset]))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Processes wait for each other, and accumulated batches make one step.
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroups(lengths, together, seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer.training_step; LogValues callbacks see the batch."""
        for callback in self._log_values():
            callback.see_batch(inputs)
        if not self._replays_steps:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss
        return self._step_by_graph(inputs, *args, **kwargs)

    def _step_by_graph(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The step, with all that changes from one to the next in tensors."""
        if self.step_graphs is None:
            self.step_graphs = StepGraphs(self._graphed_step, self.model, lambda: cuda_capture(self.args.device))
        # Of a replay nothing but kernels runs.
        if not self.model.training:
            self.model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        if isinstance(num_items_in_batch, int):
            num_items_in_batch = torch.tensor(num_items_in_batch, device=self.args.device)
        batch = {
            **self._prepare_inputs(inputs),
            _ITEMS: num_items_in_batch,
            # Of the last step of an epoch there may be fewer.
            _MICRO_BATCHES: getattr(self, "current_gradient_accumulation_steps", None),
        }
        return self.step_graphs(batch)

    def _graphed_step(self, **batch: Any) -> Tensor:
        items = batch.pop(_ITEMS)
        del batch[_MICRO_BATCHES]
        loss: Tensor = super().training_step(self.model_wrapped, batch, num_items_in_batch=items)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log; a training log also has the values of the LogValues callbacks."""
        if "loss" in logs:
            for callback in self._log_values():
                logs.update(callback.log_values(self.args, self.state, self.model))
        super().log(logs, *args, **kwargs)

    def _log_values(self) -> list[LogValues]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, LogValues)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, scalar, and with `return_outputs` the base model's output as well.

        `num_items_in_batch` is the number of labelled tokens of all the batches of an optimiser step: the sum
        over this batch's tokens is divided by it, so accumulated steps equal one step on the joined batch.
        """
        inputs = self._model_inputs(inputs)
        if self.label_smoother is None or self.compute_loss_func is not None or "labels" not in inputs:
            found = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            surplus = surplus_of_loss(self.args) if num_items_in_batch is not None else 1
            if surplus == 1 or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
                return found
            return (found[0] / surplus, found[1]) if return_outputs else found / surplus
        # Trainer shifts the labels for smoothing only where it knows the model's class name.
        labels = inputs["labels"]
        outputs = model(**inputs)
        loss = self.label_smoother(outputs, labels, shift_labels=self._loss_shifts_labels)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            counted = labels[..., 1:] if self._loss_shifts_labels else labels
            loss = loss * (counted != self.label_smoother.ignore_index).sum() / num_items_in_batch
            loss = self._across_processes(loss)
        return (loss, outputs) if return_outputs else loss

    def _across_processes(self, loss: Tensor) -> Tensor:
        """A sum divided by the items of all processes, such that the mean over processes is the mean over items."""
        if not self.args.average_tokens_across_devices:
            return loss
        shares: int = self.accelerator.num_processes // tensor_parallel_size(self.args)
        return loss * shares

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As Trainer.prediction_step; the base model's config says which outputs are no predictions."""
        if ignore_keys is None:
            config = getattr(self._base, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"]))
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            inputs = self._model_inputs(inputs)  # which compute_loss does where there are labels
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: matrices, except orthonormal R's."""
        if self.pyreft_compat:
            return []
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ".rotate_layer." not in name and _is_matrix(model, name)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.create_optimizer; AdamW is StiefelAdamW where R with orthonormal rows is itself a parameter."""
        polar = any(isinstance(p, StiefelParameter) and p.requires_grad for p in self.model.parameters())
        given: Any = getattr(self, "optimizer", None)
        if given is not None or not polar or self.args.optim not in _ADAMW:
            return super().create_optimizer(*args, **kwargs)
        decayed = set(self.get_decay_parameter_names(self.model))
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer: Any = StiefelAdamW(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; `resume_from_checkpoint=True` takes the last complete checkpoint."""
        if resume_from_checkpoint is True:
            last = last_complete_checkpoint(self.args.output_dir)
            if last is None:
                raise ValueError(f"no complete checkpoint to resume from in {self.args.output_dir}")
            resume_from_checkpoint = str(last)
        self.step_graphs = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model; of a sharded model the adapter alone is put together."""
        if self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.is_fsdp_enabled:
            save_together(self.model, folder, writes=self.args.should_save)
        elif self.args.should_save:
            save_beside(self.model, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process marks the checkpoint as complete next; the states of the others are parts of it.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(self.state.best_model_checkpoint)

    def _load(self, folder: str) -> None:
        with taking_whole_tensors(self.is_fsdp_enabled):
            self.model.load_adapter(folder)
            if (Path(folder) / BASE_FILE).is_file():
                load_base_tensors(folder, self.model.model)


def _read_in_every_process(args: Any) -> None:
    """accelerate would read a stream in one process and join the batches of all, which have different lengths."""
    config: Any = args.accelerator_config
    if config.dispatch_batches is None:
        config.dispatch_batches = False


def _is_matrix(model: nn.Module, name: str) -> bool:
    parameter: Tensor = model.get_parameter(name)
    return parameter.ndim >= 2
