"""Accuracy on held-out rows after every epoch of a language model's training."""

from __future__ import annotations

from typing import Any

from reft_kernels.training.causal_lm import ReftTrainerForCausalLM


class ScoringTrainer(ReftTrainerForCausalLM):
    """ReftTrainerForCausalLM whose `evaluate` adds what a job's own way of scoring gives on the held-out rows.

    Args:
        score: gives metrics by name; None for the loss alone.
    """

    def __init__(self, *args: Any, score: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score = score

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Trainer.evaluate, with `eval_accuracy` and its like."""
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.score is not None:
            added = {f"{metric_key_prefix}_{name}": value for name, value in self.score(self.model).items()}
            self.log(dict(added))
            found |= added
        return found
