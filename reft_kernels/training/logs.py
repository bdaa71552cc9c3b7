"""The names in the Trainer's logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX = "eval_"
# What an evaluation logs that is no metric of the model.
_SPEED = ("_runtime", "_per_second", "_preparation_time")


def metrics_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation in a log, the loss among them, without the word `eval_` in their names."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in logs.items()
        if name.startswith(_PREFIX) and not name.endswith(_SPEED) and is_number(value)
    }


def is_number(value: object) -> bool:
    """Whether a logged value is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def step_of(entry: Mapping[str, Any]) -> int:
    """The optimiser step of a log, 0 where it has none."""
    step = entry.get("step", 0)
    return step if isinstance(step, int) else 0


def words(name: str) -> str:
    """A name as people write it."""
    return name.replace("_", " ")
