"""How one setting is read and checked, whether it comes from a file, from `key=value` or from the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """How a setting is read: its type, its least and greatest value, its choices, and what `--help` says of it."""

    kind: type
    help: str
    group: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    many: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        """The value in the setting's own type. Raises ValueError that names it."""
        if value is None and self.optional:
            return None
        if self.many:
            items = [value] if isinstance(value, (str, int, float)) else value
            if not isinstance(items, (list, tuple)):
                raise ValueError(f"{name} must be a list, got {value!r}")
            return tuple(self._one(name, item) for item in items)
        return self._one(name, value)

    def _one(self, name: str, value: Any) -> Any:
        whole = isinstance(value, float) and value.is_integer()
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif self.kind is int and whole:
            value = int(value)
        if not isinstance(value, self.kind) or (self.kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} must be {_WORDS[self.kind]}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if self.minimum is not None and isinstance(value, (int, float)) and value < self.minimum:
            raise ValueError(f"{name} must be at least {self.minimum}, got {value}")
        if self.maximum is not None and isinstance(value, (int, float)) and value > self.maximum:
            raise ValueError(f"{name} must be at most {self.maximum}, got {value}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}")
        return value

    def read(self, name: str, text: str) -> Any:
        """The value that a text stands for: "none" for an optional one, items between commas for several."""
        if self.optional and text.lower() == "none":
            return None
        if self.many:
            one = replace(self, many=False)
            return self.check(name, [one.read(name, item) for item in text.split(",") if item])
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{name} must be true or false, got {text!r}")
            return text.lower() == "true"
        if self.kind is str:
            return self.check(name, text.replace("\\n", "\n"))
        try:
            return self.check(name, self.kind(text))
        except ValueError as error:
            if str(error).startswith(name):
                raise
            raise ValueError(f"{name} must be {_WORDS[self.kind]}, got {text!r}") from None


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
