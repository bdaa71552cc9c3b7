"""transformers' Trainer for a ReftModel: the adapter alone is trained, saved and resumed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft_kernels.checkpoint import ADAPTER_FILE, BASE_FILE, CONFIG_FILE, load_base_tensors
from reft_kernels.model import ReftModel
from reft_kernels.stiefel import StiefelParameter
from reft_kernels.stiefel_adamw import StiefelAdamW
from reft_kernels.training.data import IGNORE_INDEX, SupervisedCollator, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = "target_columns"
STATE_FILE = "trainer_state.json"
_ADAMW = ("adamw_torch", "adamw_torch_fused")
# The order in which they are put into a folder; without the last it is no adapter.
FILES = (ADAPTER_FILE, BASE_FILE, CONFIG_FILE)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The `checkpoint-N` folder of the largest N in `folder` that was written to its end, or None.

    The Trainer writes `trainer_state.json` last, so a checkpoint whose writing was cut short lacks it (or
    holds half of it) and is passed over.
    """
    found: list[tuple[int, Path]] = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


class ReftTrainerForCausalLM(Trainer):  # type: ignore[misc,unused-ignore]
    """Trains a ReftModel over a causal language model (pyreft `ReftTrainerForCausalLM`).

    Everything of transformers' Trainer holds: arguments, callbacks, progress bar, evaluation, checkpoints,
    resuming and the best model at the end. The differences:

    - A checkpoint, and `save_model`, hold the adapter (`reft_model.save`) and nothing of the base model, except
      parameters of it that are trained too (LoRA, a classifier head).
    - The loss is the base model's own, over the labelled tokens of the whole accumulated batch.
    - `intervention_locations` [B, I, P] of the batch reaches the model, also with
      `remove_unused_columns=True`.
    - Weight decay applies to the learned matrices W (and P of the classes without orthonormal rows), not to
      biases and not to R, whose rows stay orthonormal. (In pyreft weight decay reaches no parameter at all.)
    - Where R itself is a parameter (`orthogonality="polar"`), AdamW is `StiefelAdamW`, which keeps its rows
      orthonormal.
    - In training, logits are computed for the columns of a batch that predict a target and for no others, where the
      base model can do that (`logits_to_keep`); the loss is the same.
    - Several visible GPUs without a distributed launcher are not split with DataParallel; the first is used.

    Args:
        model: a ReftModel.
        args: TrainingArguments.
        data_collator: SupervisedCollator by default, if a tokenizer is given.
        tokenizer: used for the default collator only: the base model's special tokens stay as they are, and
            checkpoints hold no tokenizer. `processing_class` is its name in newer versions of transformers.
        **kwargs: Trainer's other arguments.

    Raises:
        TypeError: `model` is no ReftModel.
        ValueError: both `tokenizer` and `processing_class` are given.
    """

    def __init__(
        self,
        model: ReftModel,
        args: Any = None,
        data_collator: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, ReftModel):
            raise TypeError(f"model must be a ReftModel (see get_reft_model), got {type(model).__name__}")
        if tokenizer is not None and processing_class is not None:
            raise ValueError("tokenizer and processing_class are two names of one argument; give one of them")
        tokenizer = tokenizer if tokenizer is not None else processing_class
        if data_collator is None and tokenizer is not None:
            data_collator = SupervisedCollator(pad_token_id(tokenizer))
        if data_collator is not None and _takes_columns(model.model):
            data_collator = _TargetColumns(data_collator)
        if args is not None and args.n_gpu > 1:
            args._n_gpu = 1
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        # Position 0 of a row is never predicted; the labels that count are those of `labels[..., 1:]`.
        self._loss_shifts_labels = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns
        base = inspect.signature(self.model.model.forward).parameters
        self._signature_columns: list[str] = list(dict.fromkeys([*known, "intervention_locations", *base]))

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
        inputs = {"use_cache": False, **inputs}
        columns = inputs.pop(COLUMNS, None)
        if self.label_smoother is None or self.compute_loss_func is not None:
            own_loss = self.compute_loss_func is None and not return_outputs
            if columns is not None and own_loss and model.training:
                inputs["logits_to_keep"] = columns
                inputs["shift_labels"] = inputs["labels"][:, 1:].index_select(1, columns)
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        # Trainer shifts the labels for smoothing only where it knows the model's class name.
        labels = inputs["labels"]
        outputs = model(**inputs)
        loss = self.label_smoother(outputs, labels, shift_labels=True)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            loss = loss * (labels[..., 1:] != self.label_smoother.ignore_index).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: matrices, except orthonormal R's."""
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
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_beside(self.model, Path(output_dir if output_dir is not None else self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(self.state.best_model_checkpoint)

    def _load(self, folder: str) -> None:
        self.model.load_adapter(folder)
        if (Path(folder) / BASE_FILE).is_file():
            load_base_tensors(folder, self.model.model)


def _takes_columns(base: nn.Module) -> bool:
    """Whether the base model can be asked for some columns' logits and for a loss on labels shifted already."""
    parameters = inspect.signature(base.forward).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return "logits_to_keep" in parameters and takes_more and shifts


class _TargetColumns:
    """Adds to a collator's batch the columns [K] whose logits predict a label in some row.

    Found here, on the host, since their number is a shape: on a GPU it would be waited for.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            batch[COLUMNS] = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]
        return batch


def save_beside(model: ReftModel, folder: Path) -> None:
    """`model.save(folder)` for a folder that may hold other files, such as the Trainer's.

    A crash leaves the old adapter, the new one, or a folder that is no adapter; never a mixture of two.
    """
    include_model = any(parameter.requires_grad for parameter in model.model.parameters())
    others = {path.name for path in folder.iterdir()} - set(FILES) if folder.is_dir() else set()
    if not others:
        model.save(folder, include_model=include_model)
        return
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=folder))
    try:
        model.save(staging, include_model=include_model)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for name in FILES:
            if (staging / name).exists():
                os.replace(staging / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_matrix(model: nn.Module, name: str) -> bool:
    parameter: Tensor = model.get_parameter(name)
    return parameter.ndim >= 2
