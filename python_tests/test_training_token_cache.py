"""Token ids that are kept on disk: made once, mapped into memory, never another's and never damaged."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_support import make_tokenizer, rows

from reft_kernels.training import token_cache
from reft_kernels.training.data import SupervisedDataset
from reft_kernels.training.token_cache import cached_table, tokenizer_fingerprint
from reft_kernels.training.token_table import TokenTable, make_table

PROMPTS = [row["instruction"] + "\n" for row in rows(40)]
OUTPUTS = [row["output"] for row in rows(40)]


def table(folder: Path | None, **changes: Any) -> TokenTable:
    options: dict[str, Any] = {
        "tokenizer": make_tokenizer(), "prompts": PROMPTS, "outputs": OUTPUTS, "max_length": 15, "append_eos": True,
        **changes,
    }  # fmt: skip
    return cached_table(folder=folder, **options)


def same(one: TokenTable, other: TokenTable) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often anything is tokenised."""
    calls: list[int] = []

    def counting(tokenizer: Any, prompts: Any, outputs: Any, **options: Any) -> TokenTable:
        calls.append(len(prompts))
        return make_table(tokenizer, prompts, outputs, **options)

    monkeypatch.setattr(token_cache, "make_table", counting)
    return calls


def test_the_second_time_nothing_is_tokenised(tmp_path: Path, made: list[int]) -> None:
    fresh = table(None)
    assert len(fresh.dropped) > 0
    assert len(fresh.prompt_lengths) > 0
    assert made == [40]
    first, second = table(tmp_path / "cache"), table(tmp_path / "cache")
    assert made == [40, 40]
    assert same(first, fresh)
    assert same(second, fresh)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_data_set_from_the_cache_is_the_same(tmp_path: Path, made: list[int]) -> None:
    edits: Any = SimpleNamespace(representations=[SimpleNamespace(positions="f2+l2")])
    sets = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="examples left out"):
            sets.append(SupervisedDataset(make_tokenizer(), edits, PROMPTS, OUTPUTS, max_length=15, cache=tmp_path))
    assert made == [40]
    assert sets[0].dropped == sets[1].dropped != []
    assert sets[0].lengths == sets[1].lengths
    for one, other in zip(*sets, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].dtype == torch.int64 and torch.equal(one[name], other[name]) for name in one)


def test_whatever_the_ids_follow_from_changes_the_file(tmp_path: Path, made: list[int]) -> None:
    table(tmp_path)
    changes: list[dict[str, Any]] = [
        {"max_length": 14},
        {"append_eos": False},
        {"prompts": [PROMPTS[0] + "!", *PROMPTS[1:]]},
        {"prompts": [PROMPTS[1], PROMPTS[0], *PROMPTS[2:]]},
        {"outputs": [*OUTPUTS[:-1], "another"]},
        {"prompts": PROMPTS[:-1], "outputs": OUTPUTS[:-1]},
        {"tokenizer": make_tokenizer(bos=True)},
        {"prompts": ["ab", "c"], "outputs": ["x", "y"]},
        {"prompts": ["a", "bc"], "outputs": ["x", "y"]},
    ]
    for change in changes:
        assert same(table(tmp_path, **change), table(None, **change))
    assert len(list(tmp_path.iterdir())) == 1 + len(changes)


def test_a_tokenizer_that_was_used_is_the_same_one() -> None:
    tokenizer = make_tokenizer(pad=True)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(PROMPTS, padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_tokenizer(pad=True)) == before
    tokenizer.add_tokens(["box"])
    assert tokenizer_fingerprint(tokenizer) != before


def damage(path: Path, kind: str) -> None:
    """Spoils a file of the cache."""
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[:-9])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one bit":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif kind == "text":
        path.write_text("no tensors", encoding="utf-8")
    elif kind == "no metadata":
        save_file(load_file(path), path)
    elif kind == "another's":
        other = table(None, prompts=["other"], outputs=["one"])
        token_cache._write(path, other, "0" * 32)
    elif kind == "not a table":
        broken = table(None)._replace(starts=torch.tensor([0, 5]))
        token_cache._write(path, broken, path.stem.removeprefix("tokens-"))


@pytest.mark.parametrize("kind", ["cut", "empty", "one bit", "text", "no metadata", "another's", "not a table"])
def test_a_damaged_or_foreign_file_is_not_used(tmp_path: Path, made: list[int], kind: str) -> None:
    fresh = table(tmp_path)
    (path,) = tmp_path.iterdir()
    copy = TokenTable(*(tensor.clone() for tensor in fresh))
    damage(path, kind)
    made.clear()
    assert same(table(tmp_path), copy)
    assert made == [40]
    assert same(table(tmp_path), copy)
    assert made == [40]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_mapped_into_memory(tmp_path: Path) -> None:
    table(tmp_path)
    (path,) = tmp_path.iterdir()
    held = table(tmp_path)
    assert str(path) in Path("/proc/self/maps").read_text()
    expected = held.ids.clone()
    path.unlink()  # what is mapped stays
    assert torch.equal(held.ids, expected)


def _make(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(table(folder).ids.tolist())


@pytest.mark.slow
def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    expected = table(None).ids.tolist()
    assert found == [expected, expected]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_full_disk_costs_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save_file", lambda *_, **__: full())
    with pytest.warns(UserWarning, match="token ids are not kept in .*No space left"):
        assert same(table(tmp_path), table(None))
    assert list(tmp_path.iterdir()) == []
