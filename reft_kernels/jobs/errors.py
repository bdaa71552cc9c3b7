"""Errors about what the user gave, in one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

USER_ERRORS = (ValueError, TypeError, KeyError, ImportError, OSError)


class UserError(Exception):
    """Something the user gave is wrong; the message is one sentence that names it.

    Attributes:
        everywhere: every process of the job raises one now.
        known: another process says what happened.
    """

    everywhere = known = False


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
        if not _is_of_torch_save(error):
            raise
        raise UserError(f"{what}: torch.save could not write a file to its end (is the disk full?)") from error


def _is_of_torch_save(error: RuntimeError) -> bool:
    """Whether an error came up in torch.save, which says many things of a full disk, but not the system's error."""
    import torch.serialization

    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    return any(code.co_filename == torch.serialization.__file__ and code.co_name == "save" for code in codes)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
