"""One training job as each package runs it: the sides of benchmarks.training_steps.

Every side has a model object of its own over the same frozen weights, which they share, and is given the same batches.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.positions import parse_positions
from reft_kernels.training.collators import LOCATIONS

Batch = dict[str, Any]


class Unavailable(Exception):
    """A side that this machine cannot run."""


@dataclass
class Job:
    """What all sides train: the base model, frozen, the batches of SupervisedCollator and the adapter's settings."""

    base: nn.Module
    batches: list[Batch]
    positions: str
    rank: int
    lr: float

    def model(self) -> Any:
        """Another object of the base model, over the same weights."""
        return copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})

    @property
    def layers(self) -> int:
        return int(self.base.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]

    @property
    def width(self) -> int:
        return int(self.base.config.hidden_size)  # type: ignore[union-attr, arg-type]


@dataclass
class Side:
    """One way to run the job.

    Attributes:
        loss: of batch k, with the graph that a backward needs.
        parameters: what is trained; empty for a side that runs the frozen model alone.
        edits: the interventions, one a layer, where they are LoReFT's.
        optimizer: steps ``parameters``.
        backward: whether a step goes backward.
        cache: the FrozenCache, where there is one.
        forward_backward: both of batch k, instead of the backward of ``loss``.
    """

    loss: Callable[[int], Tensor]
    parameters: list[nn.Parameter]
    edits: list[nn.Module]
    optimizer: torch.optim.Optimizer | None = None
    backward: bool = True
    cache: Any = None
    forward_backward: Callable[[int], Tensor] | None = None

    def step(self, index: int) -> Tensor:
        """A whole training step on batch ``index``, and its loss."""
        if not self.backward:
            with torch.no_grad():
                return self.loss(index)
        if self.forward_backward is not None:
            loss = self.forward_backward(index)
        else:
            loss = self.loss(index)
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def trained(
    loss: Callable[[int], Tensor], model: nn.Module, job: Job, edits: list[nn.Module], make: Any = torch.optim.AdamW
) -> Side:
    """A side with an AdamW over all of the model that requires a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Side(loss, parameters, edits, make(parameters, lr=job.lr, weight_decay=0.0))


def plain_inputs(batch: Batch) -> Batch:
    """The batch as a transformers model takes it."""
    return {name: value for name, value in batch.items() if name != LOCATIONS}


def for_targets(batch: Batch) -> Batch:
    """The batch with logits for the columns that predict a target alone, as this package's trainer asks for them."""
    from reft_kernels.training.target_columns import COLUMNS, TargetColumns

    more = TargetColumns(lambda rows: dict(rows))(batch)
    columns = more.pop(COLUMNS)
    return {**more, "logits_to_keep": columns, "shift_labels": more["labels"][:, 1:].index_select(1, columns)}


def forward(job: Job) -> Side:
    """The frozen model's forward with its loss, without gradient."""
    model = job.model()
    return Side(lambda k: model(**plain_inputs(job.batches[k]), use_cache=False).loss, [], [], backward=False)


def floor(job: Job) -> Side:
    """The frozen model's forward, and the backward of the gradients of its hidden states; nothing is edited.

    They reach the output of the first layer, which is as far as edits of block outputs need them.
    """
    model = _cut(job.model())
    return Side(lambda k: model(**plain_inputs(job.batches[k]), use_cache=False).loss, [], [])


def floor_targets(job: Job) -> Side:
    """As ``floor``, with logits for the columns that predict a target alone."""
    model = _cut(job.model())
    batches = [for_targets(plain_inputs(batch)) for batch in job.batches]
    return Side(lambda k: model(**batches[k], use_cache=False).loss, [], [])


def _cut(model: Any) -> Any:
    def detach(_module: nn.Module, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = h.detach().requires_grad_(torch.is_grad_enabled())
        return (h, *output[1:]) if isinstance(output, tuple) else h

    model.model.layers[0].register_forward_hook(detach)
    return model


def pyreft(job: Job) -> Side:
    """The authors' pyreft; positions as nested lists made from the batch's tensor, as its trainer's loss does."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft

    entries = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": job.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=job.width, low_rank_dimension=job.rank, dtype=torch.float32
            ),
        }
        for layer in range(job.layers)
    ]
    model = pyreft.get_reft_model(job.model(), pyreft.ReftConfig(representations=entries), set_device=False)
    model.interventions.to(next(job.base.parameters()).device)

    def loss(k: int) -> Tensor:
        batch = job.batches[k]
        base = {name: batch[name] for name in ("input_ids", "attention_mask")}
        where = {"sources->base": (None, batch[LOCATIONS].permute(1, 0, 2).tolist())}
        _, output = model(base, unit_locations=where, labels=batch["labels"], use_cache=False)
        return output.loss  # type: ignore[no-any-return]

    edits = list(model.interventions.values())
    return trained(loss, nn.ModuleList(edits), job, edits)


def adapters(job: Job) -> Side:
    """AdapterHub's LoReFT. Its suffix is the end of the row, not of the prompt: as many tokens, others."""
    import adapters

    first, last = parse_positions(job.positions) or (0, 0)
    model = job.model()
    adapters.init(model)
    kind = adapters.LoReftConfig(
        r=job.rank, prefix_positions=first, suffix_positions=last, tied_weights=True, dropout=0.0
    )
    model.add_adapter("loreft", config=kind)
    model.train_adapter("loreft")
    model.eval().to(next(job.base.parameters()).device)
    units = [module for module in model.modules() if type(module).__name__ == "ReftUnit"]
    return trained(
        lambda k: model(**plain_inputs(job.batches[k]), use_cache=False).loss, nn.ModuleList(units), job, units
    )


def lora(job: Job) -> Side:
    """PEFT's LoRA of the same rank in its own choice of modules (for Llama q_proj and v_proj), in all layers."""
    import peft

    config = peft.LoraConfig(r=job.rank, lora_alpha=2 * job.rank, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(job.model(), config)
    return trained(lambda k: model(**plain_inputs(job.batches[k]), use_cache=False).loss, model, job, [])


def reft_kernels(job: Job, orthogonality: str | None = None) -> Side:
    """This package's ReftModel, with logits for all columns as the others."""
    model, edits = _reft_model(job, orthogonality)
    make: Any = torch.optim.AdamW
    if orthogonality == "polar":
        from reft_kernels import StiefelAdamW as make
    return trained(lambda k: model(**job.batches[k], use_cache=False).loss, nn.ModuleList(edits), job, edits, make)


def reft_kernels_polar(job: Job) -> Side:
    """The same with R as the parameter, which StiefelAdamW keeps orthonormal."""
    return reft_kernels(job, "polar")


def reft_kernels_targets(job: Job) -> Side:
    """The same as the package's trainer runs it: logits for the columns that predict a target alone."""
    model, edits = _reft_model(job)
    batches = [for_targets(batch) for batch in job.batches]
    return trained(lambda k: model(**batches[k], use_cache=False).loss, nn.ModuleList(edits), job, edits)


def reft_kernels_graphs(job: Job) -> Side:
    """The same with --step-graphs: forward and backward are a replay of a CUDA graph."""
    from reft_kernels.training.step_graphs import StepGraphs, cuda_capture

    device = next(job.base.parameters()).device
    try:
        cuda_capture(device)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    model, edits = _reft_model(job)
    batches = [for_targets(batch) for batch in job.batches]

    def forward_backward(**batch: Tensor) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    side = trained(lambda k: model(**batches[k], use_cache=False).loss, nn.ModuleList(edits), job, edits)
    graphs = StepGraphs(forward_backward, nn.ModuleList(edits), lambda: cuda_capture(device), before=1)
    side.forward_backward = lambda k: graphs(batches[k])
    return side


def reft_kernels_cached(job: Job) -> Side:
    """The same with --cache-frozen memory: what never changes is looked up."""
    from reft_kernels.training import FrozenCache
    from reft_kernels.training.frozen_rows import suffix_batch

    model, edits = _reft_model(job)
    cache = FrozenCache(model, "memory", budget=None)
    device = next(job.base.parameters()).device
    batches = []
    for batch in job.batches:
        cut = for_targets(suffix_batch({name: value.cpu() for name, value in batch.items()}))
        batches.append({name: value.to(device) if isinstance(value, Tensor) else value for name, value in cut.items()})

    def loss(k: int) -> Tensor:
        with cache.apply(batches[k]) as inputs:
            return model(**inputs).loss  # type: ignore[no-any-return]

    side = trained(loss, nn.ModuleList(edits), job, edits)
    side.cache = cache
    return side


def _reft_model(job: Job, orthogonality: str | None = None) -> tuple[Any, list[nn.Module]]:
    from reft_kernels import ReftConfig, get_reft_model

    config = ReftConfig(
        method="loreft", layers="all", rank=job.rank, positions=job.positions, orthogonality=orthogonality
    )
    model = get_reft_model(job.model(), config)
    return model, list(model.interventions.values())


@torch.no_grad()
def share_weights(sides: dict[str, Side]) -> None:
    """Every side that trains LoReFT starts from the same R, W and b."""
    for layer, ours in enumerate(sides["reft_kernels"].edits):
        R = ours.rotate_layer.weight.detach().clone()  # [d, r]
        source = {name: value.clone() for name, value in ours.learned_source.state_dict().items()}
        for side in sides.values():
            if side.edits:
                edit = side.edits[layer]
                edit.learned_source.load_state_dict(source)
                if hasattr(edit, "projection"):
                    edit.projection.weight = R.T.contiguous()
                else:
                    edit.rotate_layer.weight = R.clone()


BUILDERS: dict[str, Callable[[Job], Side]] = {
    "forward": forward,
    "floor": floor,
    "floor_targets": floor_targets,
    "pyreft": pyreft,
    "adapters": adapters,
    "lora": lora,
    "reft_kernels": reft_kernels,
    "reft_kernels_polar": reft_kernels_polar,
    "reft_kernels_targets": reft_kernels_targets,
    "reft_kernels_graphs": reft_kernels_graphs,
    "reft_kernels_cached": reft_kernels_cached,
}
