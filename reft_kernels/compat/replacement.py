"""One attribute of somebody else's class or module, replaced and put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """What takes the place of ``owner.name``, and why.

    Attributes:
        owner: the class or module.
        name: of its attribute.
        value: what it becomes.
        mends: the reason, in words.
        new: whether the owner has no such attribute yet.
    """

    owner: Any
    name: str
    value: Any
    mends: str
    new: bool = False

    @property
    def place(self) -> str:
        """The attribute's full name."""
        module = getattr(self.owner, "__module__", None)
        name = getattr(self.owner, "__qualname__", self.owner.__name__)
        return ".".join(part for part in (module, name, self.name) if part)

    def obstacle(self) -> str | None:
        """Why it cannot be applied, or None."""
        if self.new or hasattr(self.owner, self.name):
            return None
        return f"there is no {self.place}"

    def apply(self) -> Any:
        """Replace the attribute. Returns what :meth:`undo` needs."""
        before = vars(self.owner).get(self.name, _ABSENT)
        setattr(self.owner, self.name, self.value)
        return before

    def undo(self, before: Any) -> None:
        """Put back what :meth:`apply` found."""
        if before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, before)
