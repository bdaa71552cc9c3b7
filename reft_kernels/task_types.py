"""pyreft's two enumerations (``pyreft/utils.py``), whose members are strings."""

from __future__ import annotations

from enum import Enum


class ReftType(str, Enum):
    """Kinds of ReFT that pyreft names."""

    LOREFT = "LOREFT"
    NLOREFT = "NOREFT"


class TaskType(str, Enum):
    """Kinds of tasks that pyreft names."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"
