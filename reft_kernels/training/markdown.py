"""Texts that stand in Markdown as nothing but text."""

from __future__ import annotations

import re


def plain(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text, on one line."""
    text = text.replace("\n", "⏎").replace("\r", "")
    text = re.sub(r"([\\`*_\[\]~#])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def cell(text: str) -> str:
    """Such a text in a table."""
    return plain(text).replace("|", "\\|")
