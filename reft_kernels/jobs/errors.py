"""Errors about what the user gave, in one sentence that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

USER_ERRORS = (ValueError, TypeError, KeyError, ImportError, OSError)


class UserError(Exception):
    """Something the user gave is wrong; the message is one sentence that names it."""


@contextmanager
def user_errors(what: str, kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turns errors about what the user gave into a UserError that starts with `what`."""
    try:
        yield
    except kinds as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
