"""``patch_pyreft()``: the fused edits inside of an installed pyreft, and its faults mended."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

from reft_kernels.compat import patched_files, patched_interventions, patched_pyvene, patched_trainers
from reft_kernels.compat.replacement import Replacement


@dataclass
class PatchReport:
    """What :func:`patch_pyreft` did.

    Attributes:
        versions: of pyreft and pyvene.
        applied: full name of every attribute replaced, with what that mends.
        skipped: those that this version does not have, with the reason.
    """

    versions: dict[str, str]
    applied: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{versions}: {len(self.applied)} attributes patched, {len(self.skipped)} skipped"]
        lines += [f"  {place}: {mends}" for place, mends in self.applied.items()]
        lines += [f"  skipped {place}: {reason}" for place, reason in self.skipped.items()]
        return "\n".join(lines)


_applied: list[tuple[Replacement, Any]] = []
_reports: list[PatchReport] = []


def patch_pyreft() -> PatchReport:
    """Make an installed pyreft compute its edits with this library, and mend what can be mended from outside.

    Call it before the script makes its interventions: those keep the d x d buffer that they were made with, all else
    reaches them too. Its classes, signatures and files stay pyreft's. Calling it again changes nothing.

    Returns:
        What was patched, to be printed.

    Raises:
        ImportError: pyreft or pyvene is not installed.
    """
    if _reports:
        return _reports[0]
    try:
        pyvene, pyreft = (importlib.import_module(name) for name in ("pyvene", "pyreft"))
    except ImportError as error:
        raise ImportError(f"patch_pyreft() needs pyreft and pyvene: {error}") from error
    report = PatchReport({name: importlib.metadata.version(name) for name in ("pyreft", "pyvene")})
    for part in (patched_interventions, patched_pyvene, patched_files, patched_trainers):
        for replacement in part.replacements(pyreft, pyvene):
            obstacle = replacement.obstacle()
            if obstacle is None:
                _applied.append((replacement, replacement.apply()))
                report.applied[replacement.place] = replacement.mends
            else:
                report.skipped[replacement.place] = obstacle
    _reports.append(report)
    return report


def unpatch_pyreft() -> None:
    """Put pyreft and pyvene back as they were. Interventions made in between keep their slim R and go on working.

    Of those of ConsReFT, LobiReFT and DiReFT pyreft then saves files with that R, which this library's
    ``ReftModel.load`` reads and pyreft alone does not: save before.
    """
    while _applied:
        replacement, before = _applied.pop()
        replacement.undo(before)
    _reports.clear()
