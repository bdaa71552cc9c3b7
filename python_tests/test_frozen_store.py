"""Where frozen states are kept: budgets, files that a later run uses, and those that it must not."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_support import LENGTHS, cached, largest_difference, make_model, make_rows, uncached
from torch import Tensor

from reft_kernels.model import ReftModel
from reft_kernels.training import FrozenCache, SuffixCollator, SupervisedCollator, frozen_fingerprint
from reft_kernels.training import frozen_store as store_module
from reft_kernels.training.frozen_fingerprint import fingerprint, tensor_sums
from reft_kernels.training.frozen_part import find_frozen_part
from reft_kernels.training.frozen_store import DiskStore, Entry

collate = SuffixCollator(SupervisedCollator())


def assert_same_as_uncached(model: ReftModel, cache: FrozenCache, items: list[dict[str, Tensor]]) -> None:
    wanted = uncached(model, items)
    for one in (items, items[:3], items[::-1]):
        wanted = uncached(model, one)
        loss, grads = cached(model, cache, collate(one))
        assert float(loss) == pytest.approx(float(wanted[0]), rel=1e-12)
        assert largest_difference(grads, wanted[1]) < 1e-11


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_what_fits_into_the_budget_is_kept_and_the_rest_is_computed() -> None:
    model = make_model(layers="all")
    items = make_rows(model)
    whole = FrozenCache(model)
    cached(model, whole, collate(items))
    # Of each row: keys and values of two blocks before t0, hidden states of 16 values from t0 on, in float64.
    starts = [n - min(2, n // 2) if n > 1 else 0 for n, _ in LENGTHS]
    sizes = [8 * (2 * 2 * 8 * t + 16 * (n + k - t)) for t, (n, k) in zip(starts, LENGTHS, strict=True)]
    assert whole.stats.bytes == sum(sizes)
    kept = [t for entry in whole._store._entries.values() for t in entry]
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(sizes)  # and nothing of the batch with them

    half = FrozenCache(model, budget=sizes[0] + sizes[1] + 1)
    with pytest.warns(UserWarning, match=r"budget of [\d,]+ bytes is used up .* computed at every epoch") as caught:
        assert_same_as_uncached(model, half, items)
    assert len(caught) == 1
    assert half.stats.bytes == sizes[0] + sizes[1]
    assert (half.stats.hits, half.stats.misses, half.stats.not_kept) == (4, 9, 7)

    with pytest.warns(UserWarning, match="budget of 0 bytes"):
        assert_same_as_uncached(model, FrozenCache(model, budget=0), items)
    assert_same_as_uncached(model, FrozenCache(model, budget=None), items)


def test_a_row_that_comes_twice_is_kept_once() -> None:
    model = make_model()
    items = make_rows(model)
    cache = FrozenCache(model)
    cached(model, cache, collate(items))
    twice = FrozenCache(model)
    cached(model, twice, collate([*items, *items]))
    assert twice.stats.bytes == cache.stats.bytes > 0


def test_a_later_run_uses_the_files(tmp_path: Path) -> None:
    model = make_model()
    items = make_rows(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_as_uncached(model, FrozenCache(model, "disk", folder=tmp_path / "states"), items)
        assert len(files(tmp_path)) == len(items)
        again = make_model()
        cache = FrozenCache(again, "disk", folder=tmp_path / "states")
        assert_same_as_uncached(again, cache, items)
    assert cache.stats.misses == 0
    assert cache.stats.bytes == sum(path.stat().st_size for path in files(tmp_path))
    assert not list(tmp_path.rglob(".*"))
    (about,) = tmp_path.rglob("about.json")
    assert json.loads(about.read_text())["frozen_blocks"] == 2


def other_weight(model: ReftModel) -> ReftModel:
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight[1, 2] *= 1 + 1e-12
    return model


def swapped_weights(model: ReftModel) -> ReftModel:
    with torch.no_grad():
        weight = model.model.model.layers[1].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    return model


OTHERS: dict[str, Any] = {
    "a weight": lambda: other_weight(make_model()),
    "two rows of a weight": lambda: swapped_weights(make_model()),
    "dtype": lambda: make_model(dtype=torch.float32),
    "first edited layer": lambda: make_model(layers=[0, 2]),
    "component": lambda: make_model(component="block_input"),
    "architecture": lambda: make_model("qwen3"),
    "config": lambda: with_config(make_model(), "rms_norm_eps", 1e-5),
    "transformers": make_model,
}


def with_config(model: ReftModel, name: str, value: Any) -> ReftModel:
    setattr(model.model.config, name, value)
    return model


@pytest.mark.parametrize("other", OTHERS)
def test_another_models_files_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    model = make_model()
    items = make_rows(model, seed=3)
    cached(model, FrozenCache(model, "disk", folder=tmp_path), collate(items))
    if other == "transformers":
        monkeypatch.setattr(frozen_fingerprint, "transformers_version", "9.9.9")
    changed = OTHERS[other]()
    cache = FrozenCache(changed, "disk", folder=tmp_path)
    wanted = uncached(changed, items)
    loss, _ = cached(changed, cache, collate(items))
    assert float(loss) == pytest.approx(float(wanted[0]), rel=1e-5 if other == "dtype" else 1e-12)
    assert (cache.stats.hits, cache.stats.misses) == (0, len(items))
    assert len(files(tmp_path)) == 2 * len(items)


def test_other_positions_and_tokens_are_other_entries(tmp_path: Path) -> None:
    model = make_model()
    items = make_rows(model, seed=3)
    cached(model, FrozenCache(model, "disk", folder=tmp_path), collate(items))
    wider = make_model(positions="l3")
    cache = FrozenCache(wider, "disk", folder=tmp_path)
    rows = make_rows(wider, "l3", seed=3)
    rows[1]["input_ids"][0] += 1
    assert all(map(torch.equal, rows[0]["input_ids"], items[0]["input_ids"]))
    assert_same_as_uncached(wider, cache, rows)
    # l3 is l2 for a prompt of 5 tokens or fewer, of which the second row has another token.
    assert cache.stats.misses == 3
    assert len(files(tmp_path)) == 8


def test_a_stale_fingerprint_would_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with an uncached batch finds what the fingerprint is there to keep out."""
    monkeypatch.setattr("reft_kernels.training.frozen_cache.fingerprint", lambda *given: "00")
    model = make_model()
    items = make_rows(model, seed=3)
    cached(model, FrozenCache(model, "disk", folder=tmp_path), collate(items))
    changed = swapped_weights(make_model())
    with pytest.raises(RuntimeError, match="computes other hidden states"):
        cached(changed, FrozenCache(changed, "disk", folder=tmp_path), collate(items))


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    model = make_model()
    items = make_rows(model)
    cached(model, FrozenCache(model, "disk", folder=tmp_path), collate(items))
    damaged, foreign, *_ = files(tmp_path)
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[:-9])
    store_module.write_safetensors(foreign, {"other": torch.zeros(2)})
    again = FrozenCache(model, "disk", folder=tmp_path)
    with pytest.warns(UserWarning, match="it is computed again"):
        assert_same_as_uncached(model, again, items)
    assert again.stats.misses == 2
    assert len(damaged.read_bytes()) == len(intact)
    assert len(files(tmp_path)) == len(items)


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    items = make_rows(model)
    written: list[Path] = []
    write = store_module.write_safetensors

    def fill(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, tensors)

    monkeypatch.setattr(store_module, "write_safetensors", fill)
    cache = FrozenCache(model, "disk", folder=tmp_path)
    with pytest.warns(UserWarning, match="cannot be written .*No space left on device") as caught:
        assert_same_as_uncached(model, cache, items)
    assert len(caught) == 1
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.rglob(".*"))
    assert cache.stats.hits == 4


def test_two_stores_of_one_folder(tmp_path: Path) -> None:
    one, other = DiskStore(None, tmp_path), DiskStore(10_000, tmp_path)
    for store in (one, other):
        store.use("ab", {"model": "M"})
    entry = Entry(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), torch.randn(5, 8).to(torch.bfloat16))
    assert other.get("00ff") is None
    assert one.put("00ff", entry)
    found = other.get("00ff")
    assert found is not None
    assert all(map(torch.equal, found, entry))
    assert other.bytes == one.bytes == entry.nbytes == 2 * 96 + 80
    assert other.put("00ff", entry)
    assert other.bytes == entry.nbytes
    one.use("cd", {"model": "N"})
    assert one.get("00ff") is None
    assert one.bytes == 0


def test_what_a_store_refuses(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="place must be one of memory, pinned, disk, got 'gpu'"):
        FrozenCache(model, "gpu")
    with pytest.raises(ValueError, match="place='disk' and folder=None"):
        FrozenCache(model, "disk")
    with pytest.raises(ValueError, match="place='memory' and folder='here'"):
        FrozenCache(model, folder="here")
    with pytest.raises(ValueError, match="budget must be a number of bytes of at least 0, or None, got -1"):
        FrozenCache(model, budget=-1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not a folder"):
        FrozenCache(model, "disk", folder=tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'pinned' needs a CUDA device"):
            FrozenCache(model, "pinned")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_sums_tell_tensors_apart(dtype: torch.dtype) -> None:
    one = torch.randint(0, 2, (3, 2**19)).to(dtype)
    sums = tensor_sums({"one": one})
    assert sums == tensor_sums({"one": one.clone()}) == tensor_sums({"one": one.T.contiguous().T})
    for row, column in ((0, 0), (2, 2**19 - 1)):
        other = one.clone()
        other[row, column] = 1 - other[row, column].int()
        assert tensor_sums({"one": other}) != sums
    assert tensor_sums({"one": one.flip(0)}) != sums or torch.equal(one, one.flip(0))
    assert tensor_sums({"one": one.view(2, -1)}) != sums
    assert tensor_sums({"other": one}) != sums
    assert tensor_sums({"none": one[:0], "scalar": one[0, 0]}) == tensor_sums({"none": one[:0], "scalar": one[0, 0]})


def test_a_fingerprint_is_the_same_for_the_same_model() -> None:
    found = {fingerprint(find_frozen_part(make_model()), "as the weights") for _ in range(2)}
    assert len(found) == 1
    assert fingerprint(find_frozen_part(make_model()), "torch.bfloat16") not in found
    # Edits, and what their weights are, have no part in it.
    assert fingerprint(find_frozen_part(make_model(method="direft", rank=3)), "as the weights") in found


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["memory", "pinned", "disk"])
def test_places_of_a_gpu(tmp_path: Path, place: str) -> None:
    model = make_model(dtype=torch.float32, layers="all").cuda()
    items = make_rows(model)
    whole = {name: value.cuda() for name, value in SupervisedCollator()(items).items()}
    wanted = float(model(**whole, use_cache=False).loss)
    cache = FrozenCache(model, place, folder=tmp_path if place == "disk" else None)
    batch = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in collate(items).items()}
    for _ in range(2):
        with cache.apply(batch) as inputs:
            assert float(model(**inputs).loss) == pytest.approx(wanted, rel=1e-4)
    assert cache.stats.hits == len(items)
