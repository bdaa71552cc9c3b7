"""pyreft's trainers on the transformers of today."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.compat.patched_interventions import is_fused
from reft_kernels.compat.replacement import Replacement

_NOT_FOR_THE_MODEL = ("labels", "intervention_locations", "subspaces", "id")


def replacements(pyreft: Any, pyvene: Any) -> Iterator[Replacement]:
    """Constructor, loss and evaluation."""
    del pyvene
    trainer, classifier = pyreft.ReftTrainer, pyreft.ReftTrainerForSequenceClassification
    yield Replacement(trainer, "__init__", _constructor(trainer), "tokenizer= on transformers 5", new=True)
    yield Replacement(
        trainer, "compute_loss", _compute_loss, "num_items_in_batch; eval_loss; no positions read back from the device"
    )
    yield Replacement(classifier, "compute_loss", _classification_loss, "num_items_in_batch; losses in float32")
    yield Replacement(classifier, "evaluate", _evaluate, "evaluation where interventions are modules, not pairs")


def _constructor(cls: Any) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        start = super(cls, self).__init__
        if tokenizer is not None:
            takes_tokenizer = "tokenizer" in inspect.signature(start).parameters
            kwargs["tokenizer" if takes_tokenizer else "processing_class"] = tokenizer
        start(*args, **kwargs)

    return __init__


def _outputs(intervenable: Any, inputs: Mapping[str, Any], labels: Tensor | None) -> Any:
    """The base model's output, edited (or not, where there is no intervention: a baseline that trains LoRA alone)."""
    model = getattr(intervenable, "module", intervenable)  # DistributedDataParallel's
    known = _argument_names(model.model)
    others = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
    base = {name: value for name, value in others.items() if known is None or name in known}
    locations, subspaces = inputs.get("intervention_locations"), inputs.get("subspaces")
    unit_locations: dict[str, Any] | None = None
    if len(model.interventions) == 0:
        unit_locations = {"sources->base": (None, 0)}  # of nothing; without any, pyvene leaves out the labels
    elif locations is not None:
        by_intervention = locations.permute(1, 0, 2)
        fused = all(is_fused(module) for module in model.interventions.values()) and subspaces is None
        unit_locations = {"sources->base": (None, by_intervention if fused else by_intervention.tolist())}
    original, edited = intervenable(
        base,
        unit_locations=unit_locations,
        labels=labels,
        subspaces=None if subspaces is None else subspaces.permute(1, 0, 2).tolist(),
    )
    return original if edited is None else edited


def _argument_names(model: nn.Module) -> set[str] | None:
    """The arguments of a model's ``forward``, those that PEFT's hands on among them; None where none has a name."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    inner = getattr(model, "get_base_model", None)
    if callable(inner) and any(p.kind == p.VAR_KEYWORD for p in parameters):
        return names | (_argument_names(inner()) or set()) or None
    return names or None


def _compute_loss(
    self: Any, intervenable: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
) -> Any:
    outputs = _outputs(intervenable, inputs, inputs["labels"])
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def _classification_loss(
    self: Any, intervenable: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **kwargs: Any
) -> Any:
    labels = inputs["labels"]
    outputs = _outputs(intervenable, inputs, None)
    logits = outputs.logits.float()
    base = getattr(intervenable, "module", intervenable).model
    kind = base.config.problem_type
    if kind is None and base.num_labels == 1:
        kind = "regression"
    elif kind is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if kind == "regression":
        loss = nn.functional.mse_loss(logits.squeeze(-1) if base.num_labels == 1 else logits, labels.float())
    elif kind == "single_label_classification":
        loss = nn.functional.cross_entropy(logits.view(-1, base.num_labels), labels.view(-1))
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def _evaluate(
    self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
) -> dict[str, float]:
    """pyreft's: ``compute_metrics`` gets float32 tensors of all logits and labels."""
    from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

    model = self.model
    parts = (model.model, model.interventions)
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    dataset = self.eval_dataset if eval_dataset is None else eval_dataset
    loader = torch.utils.data.DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
    logits, labels = [], []
    try:
        for batch in loader:
            batch = self._prepare_inputs(batch)
            logits.append(_outputs(model, batch, None).logits.float().cpu())
            labels.append(batch["labels"].float().cpu())
    finally:
        for module, training in modes:
            module.training = training
    found = denumpify_detensorize(self.compute_metrics(EvalPrediction(torch.cat(logits), torch.cat(labels))))
    prefix = f"{metric_key_prefix}_"
    metrics = {name if name.startswith(prefix) else prefix + name: value for name, value in found.items()}
    self.log(metrics)
    self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
    return metrics
