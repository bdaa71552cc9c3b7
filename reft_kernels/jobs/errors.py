"""Errors about what the user gave, in one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What torch.save says where a file cannot be written to its end; it does not pass on the system's error.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos")
USER_ERRORS = (ValueError, TypeError, KeyError, ImportError, OSError)


class UserError(Exception):
    """Something the user gave is wrong; the message is one sentence that names it."""


@contextmanager
def user_errors(what: str, kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turns errors about what the user gave into a UserError that starts with `what`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {_first_line(error)}") from error


@contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Turns a file that cannot be written into a UserError that starts with `what`, whoever was writing it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {_first_line(error)}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        raise UserError(f"{what}: torch.save could not write a file to its end (is the disk full?)") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
