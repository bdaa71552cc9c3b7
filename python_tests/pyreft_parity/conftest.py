"""Parity with the authors' pyreft, which `make test-pyreft` and `make test-pinned` install.

Where pyreft is missing nothing is collected here. On the transformers that pyreft pins, whose Trainer is older than
ours can be, the data sets and trainers are left out.
"""

from __future__ import annotations

import warnings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
else:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
        collect_ignore_glob = ["test_pyreft_dataset*.py", "test_pyreft_trainer*.py", "test_pyreft_examples.py"]
