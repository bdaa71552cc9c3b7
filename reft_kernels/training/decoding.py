"""The paper's ways of generating, as keywords of transformers' `generate`.

Source: pyreft `examples/loreft/task_config.py` and the paper. The names are those of the
prompt styles and answer rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_BEAMS = {"do_sample": True, "num_beams": 4, "early_stopping": True}

DECODING: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "commonsense": {"do_sample": False, "max_new_tokens": 32},
        "commonsense/sampling": {
            **_BEAMS,
            "max_new_tokens": 32,
            "temperature": 0.1,
            "top_p": 0.75,
            "top_k": 40,
        },
        "math": {"do_sample": False, "max_new_tokens": 512},
        "math/sampling": {**_BEAMS, "max_new_tokens": 512, "temperature": 0.3, "top_p": 0.75, "top_k": 40},
        "gsm8k": {"do_sample": False, "max_new_tokens": 256},
        "gsm8k/sampling": {"do_sample": True, "max_new_tokens": 256, "temperature": 0.1, "top_p": 0.95, "top_k": 40},
        "alpaca": {"do_sample": False, "max_length": 2048, "no_repeat_ngram_size": 5, "repetition_penalty": 1.1},
        "alpaca/greedy": {"do_sample": False, "max_length": 2048},
    }
)
"""Keywords by name. The paper reports commonsense greedily, arithmetic by sampling ("math/sampling"; the authors'
commands are greedy), instructions with "alpaca". `max_length` counts the prompt, padding included."""


def decoding_settings(name: str) -> dict[str, Any]:
    """A copy of the keywords of a name. Raises ValueError for an unknown name."""
    if name not in DECODING:
        raise ValueError(f"decoding must be one of {', '.join(DECODING)}, got {name!r}")
    return dict(DECODING[name])
