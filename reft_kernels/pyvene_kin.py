"""Interventions as stock pyvene wants them.

``pyvene.IntervenableModel`` asks with isinstance which of its interventions are trained, counted, saved and loaded, and
whether they need a source. An intervention of this library is given pyvene's classes among its bases when pyvene takes
hold of it, and never before: pyvene is not imported here.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_BASES = ("SourcelessIntervention", "TrainableIntervention", "DistributedRepresentationIntervention")
_kin: dict[type[nn.Module], type[nn.Module]] = {}


def adopt(intervention: nn.Module) -> None:
    """Make an intervention one of pyvene's sourceless, trainable ones as well, where pyvene has been imported.

    Its class becomes a subclass of the one it had, with the same name and methods. Nothing else of it changes.
    """
    pyvene = sys.modules.get("pyvene")
    found = [getattr(pyvene, name, None) for name in _BASES]
    bases = [base for base in found if isinstance(base, type)]
    if len(bases) < len(_BASES) or isinstance(intervention, tuple(bases[:1])):
        return
    cls = type(intervention)
    if cls not in _kin:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _kin[cls] = type(cls.__name__, (cls, _Adopted, *bases), {**names, "_plain": cls})
    intervention.__class__ = _kin[cls]


class _Adopted:
    """Copies and pickles an adopted intervention by its own class, which is the one that has a name to import."""

    _plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _remade, (self._plain,), self.__dict__


def _remade(cls: type[nn.Module]) -> nn.Module:
    intervention = cls.__new__(cls)
    adopt(intervention)
    return intervention
