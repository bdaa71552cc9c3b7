"""Parity with AdapterHub's ``adapters``, in an environment that has it.

Where it is missing nothing is collected here.
"""

from __future__ import annotations

import warnings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import adapters  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
