"""GLUE's metrics against values worked out by hand, and their edge cases."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction

from reft_kernels.training.metrics import METRICS, compute_metrics

# True positives 3, false positives 1, false negatives 2, true negatives 4.
PREDICTED = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
EXPECTED = {
    "accuracy": 7 / 10,
    "f1": 2 * 3 / (2 * 3 + 1 + 2),
    "matthews_correlation": (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2)),
}
# Deviations from the means 3 and 4: products 2 + 1 + 0 + 0 + 4, squares 10 and 6.
SCORES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
TARGETS = np.array([3.0, 3.0, 4.0, 4.0, 6.0])
# Ranks 1 2 3 4 5 and, ties shared, 1.5 1.5 3.5 3.5 5.
RANKS = np.array([1.5, 1.5, 3.5, 3.5, 5.0])


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def logits_of(classes: np.ndarray, num_labels: int = 2) -> np.ndarray:
    """Rows whose largest entry is the class, all of them negative."""
    return np.where(np.eye(num_labels)[classes] == 1, -1.0, -2.0 - np.random.default_rng(0).random(num_labels))


@pytest.mark.parametrize("name", EXPECTED)
def test_metrics_of_classes(name: str) -> None:
    pytest.importorskip("sklearn")
    assert METRICS[name](PREDICTED, LABELS) == pytest.approx(EXPECTED[name])
    found = compute_metrics([name])(EvalPrediction(logits_of(PREDICTED), LABELS))
    assert found == {name: pytest.approx(EXPECTED[name])}


def test_metrics_of_scores() -> None:
    pytest.importorskip("scipy")
    assert METRICS["pearson"](SCORES, TARGETS) == pytest.approx(7 / math.sqrt(10 * 6))
    assert METRICS["spearmanr"](SCORES, TARGETS) == pytest.approx(correlation(SCORES, RANKS))
    for logits in (SCORES[:, None], SCORES):
        found = compute_metrics(["pearson", "spearmanr"], regression=True)(EvalPrediction(logits, TARGETS))
        assert found == {
            "pearson": pytest.approx(7 / math.sqrt(10 * 6)),
            "spearmanr": pytest.approx(correlation(SCORES, RANKS)),
            "combined_score": pytest.approx((7 / math.sqrt(10 * 6) + correlation(SCORES, RANKS)) / 2),
        }


def test_the_combined_score_is_the_mean() -> None:
    pytest.importorskip("sklearn")
    found = compute_metrics(["accuracy", "f1"])(EvalPrediction(logits_of(PREDICTED), LABELS))
    assert found["combined_score"] == pytest.approx((EXPECTED["accuracy"] + EXPECTED["f1"]) / 2)


def test_three_classes_more_outputs_and_labels_left_out() -> None:
    classes = np.array([0, 1, 2, 2])
    labels = np.array([0, 1, 1, -100])
    outputs = (logits_of(classes, 3), np.zeros((4, 7)))
    found = compute_metrics(["accuracy"])(EvalPrediction(outputs, labels))
    assert found == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_constants(constant: str) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    same = np.zeros(10, dtype=int)
    pair = (same, LABELS) if constant == "predictions" else (PREDICTED, same)
    assert METRICS["matthews_correlation"](*pair) == 0.0
    assert METRICS["f1"](*pair) == 0.0
    assert METRICS["f1"](same, same) == 0.0
    for name in ("pearson", "spearmanr"):
        pair = (np.full(5, 2.5), TARGETS) if constant == "predictions" else (SCORES, np.full(5, 2.5))
        with pytest.warns(UserWarning, match=f"{name}: all 5 {constant} are equal"):
            assert METRICS[name](*pair) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    logits = logits_of(PREDICTED)
    logits[3, 0] = bad
    with pytest.warns(UserWarning, match="not finite: every metric is NaN"):
        found = compute_metrics(["accuracy", "f1"])(EvalPrediction(logits, LABELS))
    assert set(found) == {"accuracy", "f1", "combined_score"}
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("logits", "labels", "regression", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2), False, r"got \[3, 2\] and \[2\]"),
        (np.zeros(3), np.zeros(3), False, r"got \[3\] and \[3\]"),
        (np.zeros((3, 2)), np.full(3, -100), False, "none of 3, or all are -100"),
        (np.zeros((3, 2)), np.zeros(3), True, r"scores need logits \[N, 1\] and labels \[N\], got \[3, 2\] and \[3\]"),
        (np.zeros((0, 1)), np.zeros(0), True, r"got \[0, 1\] and \[0\]"),
    ],
)
def test_shapes_that_do_not_fit(logits: Any, labels: Any, regression: bool, message: str) -> None:
    compute = compute_metrics(["accuracy"], regression=regression)
    with pytest.raises(ValueError, match=message):
        compute(EvalPrediction(logits, labels))


def test_names() -> None:
    with pytest.raises(ValueError, match=r"metrics must be some of accuracy, f1, matthews_correlation, .*, got 'bleu'"):
        compute_metrics(["accuracy", "bleu"])
    with pytest.raises(ValueError, match="at least one"):
        compute_metrics([])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("f1", "sklearn.metrics", "scikit-learn"),
        ("matthews_correlation", "sklearn.metrics", "scikit-learn"),
        ("pearson", "scipy.stats", "scipy"),
        ("spearmanr", "scipy.stats", "scipy"),
    ],
)
def test_a_missing_package_is_named(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"the metric {name} needs {package}: pip install {package}"):
        METRICS[name](PREDICTED, LABELS)
