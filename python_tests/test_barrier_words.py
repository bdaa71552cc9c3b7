"""No two launches that may overlap share a barrier word."""

from __future__ import annotations

import threading

import pytest
import torch

from reft_kernels.backends import barrier_words
from reft_kernels.backends.barrier_words import SECTOR, Bank
from reft_kernels.triton.interpreter import interpreted


def test_words_are_zero_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier_words, "WORDS", 3)
    bank = Bank(torch.device("cpu"))
    first, again, second = bank.of_stream(7), bank.of_stream(7), bank.of_stream(8)
    assert first.data_ptr() == again.data_ptr()
    captured = bank.take()
    assert captured is not None
    addresses = {t.data_ptr() for t in (first, second, captured)}
    assert len(addresses) == 3
    assert all((address - min(addresses)) % (4 * SECTOR) == 0 for address in addresses)
    assert all(t.shape == (1,) and t.dtype == torch.int32 and int(t) == 0 for t in (first, second, captured))
    assert bank.take() is None
    late = bank.of_stream(9)  # of a further bank
    assert late.data_ptr() not in addresses
    assert bank.of_stream(9).data_ptr() == late.data_ptr()


def test_a_bank_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may be allocating from the pool of a CUDA graph, which owns what is in it."""
    zeros, threads = barrier_words._zeros, []
    monkeypatch.setattr(barrier_words, "_zeros", lambda device: threads.append(threading.get_ident()) or zeros(device))
    Bank(torch.device("cpu"))
    assert threads
    assert threading.get_ident() not in threads


def test_captures_may_share_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    barrier_words.bank(device)
    one, other = barrier_words.barrier_word(device), barrier_words.barrier_word(device)
    assert one.data_ptr() != other.data_ptr()
    with barrier_words.shared_by_captures(device):
        shared = [barrier_words.barrier_word(device).data_ptr() for _ in range(3)]
    assert len(set(shared)) == 1
    assert shared[0] not in (one.data_ptr(), other.data_ptr())
    assert barrier_words.barrier_word(device).data_ptr() not in shared


@pytest.mark.parametrize(("word", "meant"), [("1", True), ("true", True), ("ON", True), ("0", False), ("no", False)])
def test_the_interpreter_is_chosen_by_tritons_own_words(word: str, meant: bool, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert interpreted() == meant
    knobs = pytest.importorskip("triton.knobs", reason="Triton is not installed")
    assert knobs.runtime.interpret == meant
