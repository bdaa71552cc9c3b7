"""Parity with the authors' pyreft, which `make test-pyreft` installs.

Where pyreft is missing nothing is collected here.
"""

from __future__ import annotations

import warnings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
