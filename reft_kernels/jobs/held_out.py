"""Loss and metrics on held-out rows after every epoch, the same whatever the batches and the number of processes.

(Trainer's loss is a mean of batches' means, and of several processes the last batch has rows twice.)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from reft_kernels.jobs import processes
from reft_kernels.jobs.forward_passes import Chosen, Share, batches_by_length, count_targets, mean_of, predict
from reft_kernels.training.causal_lm import ReftTrainerForCausalLM
from reft_kernels.training.classification import ReftTrainerForSequenceClassification, target_losses
from reft_kernels.training.trainer import ReftTrainer

if TYPE_CHECKING:
    from reft_kernels.model import ReftModel


class _HeldOut(ReftTrainer):
    """What the trainers of jobs have in common."""

    share: Share

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Trainer.evaluate: `eval_loss`, metrics, and the time that it took."""
        del ignore_keys
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        found = self._scores(dataset)
        seconds = time.perf_counter() - start
        found |= {"runtime": seconds, "samples_per_second": len(dataset) / seconds}
        named = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(named))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _scores(self, dataset: Any) -> dict[str, float]:
        raise NotImplementedError


class LanguageTrainer(_HeldOut, ReftTrainerForCausalLM):
    """ReftTrainerForCausalLM whose `evaluate` gives the mean loss over all held-out tokens, and what a job's own way of
    scoring gives.

    Args:
        score: gives metrics by name; None for the loss alone.
        share: shares batches among processes.
        tensor_parallel: all processes have parts of one base model.
    """

    def __init__(
        self,
        model: ReftModel,
        *args: Any,
        score: Any = None,
        share: Share = processes.share,
        tensor_parallel: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.score = score
        self.share = share
        if tensor_parallel:
            setattr(model, "tp_size", processes.count())  # noqa: B010 - accelerate asks a model for it

    def _scores(self, dataset: Any) -> dict[str, float]:
        batches = batches_by_length(dataset, self.args.per_device_eval_batch_size)
        found = {"loss": mean_of(self.share(batches, lambda chosen: self._sums(dataset, chosen)))}
        return found if self.score is None else found | self.score(self.model)

    def _sums(self, dataset: Any, chosen: list[Chosen]) -> list[tuple[float, int]]:
        """The sum of the losses, and the number of targets, of each batch."""
        found = []
        self.model.eval()
        with torch.no_grad():
            for indices in chosen:
                inputs = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
                count = count_targets(inputs["labels"])
                with self.compute_loss_context_manager():
                    loss = float(self.compute_loss(self.model, inputs)) if count else 0.0
                found.append((loss * count, count))
        return found


class ClassificationTrainer(_HeldOut, ReftTrainerForSequenceClassification):
    """ReftTrainerForSequenceClassification whose `evaluate` looks at the logits of all held-out rows together.

    Args:
        share: shares batches among processes.
    """

    def __init__(self, *args: Any, share: Share = processes.share, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    def _scores(self, dataset: Any) -> dict[str, float]:
        size = self.args.per_device_eval_batch_size
        logits, labels = predict(self.model, dataset, self.data_collator, size, False, self.share)
        targets = torch.from_numpy(labels)
        losses, count = target_losses(torch.from_numpy(logits), targets, self.problem_type(targets))
        metrics: Any = self.compute_metrics
        return {"loss": float(losses.sum() / count), **metrics((logits, labels))}
