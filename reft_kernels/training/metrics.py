"""The metrics of GLUE, on scikit-learn and scipy, by the names that GLUE and transformers give them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_kernels.training.item_layout import IGNORE_INDEX

Array = NDArray[Any]
COMBINED = "combined_score"


def accuracy(predictions: Array, labels: Array) -> float:
    """The share of equal classes."""
    return float((predictions == labels).mean())


def f1(predictions: Array, labels: Array) -> float:
    """F1 of class 1 of two: 2 TP / (2 TP + FP + FN); 0 where class 1 is neither predicted nor there."""
    with _needs("f1", "scikit-learn"):
        from sklearn.metrics import f1_score
    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews_correlation(predictions: Array, labels: Array) -> float:
    """Matthews' correlation of classes; 0 where all predictions, or all labels, are one class."""
    with _needs("matthews_correlation", "scikit-learn"):
        from sklearn.metrics import matthews_corrcoef
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Array, labels: Array) -> float:
    """Pearson's correlation of scores; 0, with a warning, where all predictions, or all labels, are equal."""
    with _needs("pearson", "scipy"):
        from scipy.stats import pearsonr
    return _correlation("pearson", pearsonr, predictions, labels)


def spearmanr(predictions: Array, labels: Array) -> float:
    """Spearman's rank correlation of scores; 0, with a warning, where all predictions, or all labels, are equal."""
    with _needs("spearmanr", "scipy"):
        from scipy.stats import spearmanr as rank_correlation
    return _correlation("spearmanr", rank_correlation, predictions, labels)


METRICS: Mapping[str, Callable[[Array, Array], float]] = MappingProxyType(
    {metric.__name__: metric for metric in (accuracy, f1, matthews_correlation, pearson, spearmanr)}
)
"""(predictions [N], labels [N]) -> a number, by name."""


@contextmanager
def _needs(metric: str, package: str) -> Iterator[None]:
    """Within this context a missing package is named, and what it is for."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"the metric {metric} needs {package}: pip install {package}") from error


def _correlation(name: str, measure: Callable[[Array, Array], Any], predictions: Array, labels: Array) -> float:
    """A correlation that exists: of constants it is 0 / 0, which says as much as no correlation at all."""
    for what, values in (("predictions", predictions), ("labels", labels)):
        if len(values) < 2 or (values == values[0]).all():
            warnings.warn(f"{name}: all {len(values)} {what} are equal, so it is 0 by definition", stacklevel=3)
            return 0.0
    return float(measure(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def compute_metrics(names: Sequence[str], *, regression: bool = False) -> Callable[[Any], dict[str, float]]:
    """What Trainer takes as `compute_metrics`: from the logits and labels of all examples to metrics by name.

    Args:
        names: of METRICS. Of several the mean is added as `combined_score`.
        regression: logits [N, 1] or [N] are scores; else the class of a row of logits [N, num_labels] is its largest.

    The function takes (predictions, label_ids), as Trainer's EvalPrediction is; where the model has more outputs, the
    first is the logits. Labels of -100 are left out. Where a logit is not finite every metric is NaN, with a warning:
    such an epoch is never chosen as the best.

    Raises ValueError for an unknown name; the function raises it for shapes that do not fit and for no labels at all,
    and ImportError where a metric's package is missing.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {name!r}")
    if not names:
        raise ValueError("metrics must name at least one")

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = tuple(prediction)[:2]
        logits = np.asarray(logits[0] if isinstance(logits, (tuple, list)) else logits)
        labels = np.asarray(labels)
        finite = bool(np.isfinite(logits).all())
        chosen, labels = _scores(logits, labels) if regression else _classes(logits, labels)
        if not finite:
            warnings.warn("some logits are not finite: every metric is NaN", stacklevel=2)
        found = {name: METRICS[name](chosen, labels) if finite else float("nan") for name in names}
        if len(found) > 1:
            found[COMBINED] = float(np.mean(list(found.values())))
        return found

    return compute


def _scores(logits: Array, labels: Array) -> tuple[Array, Array]:
    if logits.size != labels.size or not labels.size:
        raise ValueError(f"scores need logits [N, 1] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    return logits.reshape(-1), labels.reshape(-1)


def _classes(logits: Array, labels: Array) -> tuple[Array, Array]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"classes need logits [N, num_labels] and labels [N], got {list(logits.shape)} and {list(labels.shape)}"
        )
    counted = labels != IGNORE_INDEX
    if not counted.any():
        raise ValueError(f"no labels to compare with: none of {len(labels)}, or all are {IGNORE_INDEX}")
    return logits.argmax(axis=1)[counted], labels[counted]
