"""Commands that a comparison would start as processes, run in this one, which has imported torch and transformers."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from reft_kernels.cli import main


def run_cells_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `compare` run its cells in this process."""

    def run(words: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert list(words[:3]) == [sys.executable, "-m", "reft_kernels"]
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = main(list(words[3:]))
        return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())

    there = SimpleNamespace(run=run, PIPE=subprocess.PIPE)  # not subprocess itself, which others use
    monkeypatch.setattr("reft_kernels.jobs.compare.subprocess", there)
