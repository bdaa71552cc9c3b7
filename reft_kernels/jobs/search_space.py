"""What a search may choose: values of settings, listed or between two numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_kernels.recipes.settings import OPTIONS, option_named

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A trial's choice."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Range:
    """A number between two, floats evenly in their logarithm where both are positive."""

    low: float
    high: float
    whole: bool

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A trial's choice."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.low > 0)


Space = Mapping[str, Choices | Range]


def read_space(texts: Sequence[str], num_layers: int | None) -> dict[str, Choices | Range]:
    """The space of ``name=a,b,c`` and ``name=low..high``; those of rank, layers, positions and lr where none is given.

    Args:
        num_layers: of the model, from which the default choices of layers follow.

    Raises ValueError naming the setting and what is wrong.
    """
    given: dict[str, Choices | Range] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise ValueError(f"expected name=a,b,c or name=low..high, got {text!r}")
        given[name] = _read(name, values)
    return given or default_space(num_layers)


def default_space(num_layers: int | None) -> dict[str, Choices | Range]:
    """Rank, layers, positions and learning rate, as wide as the paper searched (table 5)."""
    return {
        "rank": Choices((1, 2, 4, 8, 16, 32)),
        "layers": Choices(_layer_choices(num_layers)),
        "positions": Choices(("l1", "f1+l1", "f3+l3", "f5+l5", "f7+l7", "f11+l11")),
        "lr": Range(9e-5, 3e-3, whole=False),
    }


def _layer_choices(count: int | None) -> tuple[str, ...]:
    """All, every third, the first and the second half, and the middle one."""
    if count is None or count < 4:
        return ("all",)
    parts = (range(0, count, 3), range(count // 2), range(count // 2, count), range(count // 2, count // 2 + 1))
    return ("all", *dict.fromkeys(";".join(map(str, part)) for part in parts))


def _read(name: str, text: str) -> Choices | Range:
    option = option_named(name)
    if option.many:
        raise ValueError(f"{name} holds several values at once and cannot be searched over")
    low, dots, high = text.partition("..")
    if dots and option.kind in (int, float):
        ends = option.read(name, low), option.read(name, high)
        if not ends[0] < ends[1]:
            raise ValueError(f"{name}: the range {text} is empty")
        return Range(*ends, whole=option.kind is int)
    return Choices(tuple(dict.fromkeys(OPTIONS[name].read(name, item) for item in text.split(",") if item)))
