"""Launch configurations: what a lookup finds, where tables are read from, and what a broken one says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_kernels.triton import config_tables, launch_configs
from reft_kernels.triton.config_tables import (
    BackwardConfig,
    Config,
    Entry,
    ForwardConfig,
    Key,
    TableError,
    format_table,
    make_config,
    read_table,
    slug,
)

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "NVIDIA H100 80GB HBM3"
FILE = "nvidia_h100_80gb_hbm3.json"
HEADER = dict.fromkeys(config_tables.HEADER, "1.0") | {"device": DEVICE, "date": "2025-01-01"}
FORWARD = ForwardConfig(METHOD="rows", BLOCK_N=1, BLOCK_D=16384, STAGES=2, num_warps=4)
BACKWARD = BackwardConfig(
    METHOD="tiles", ROWS_N=16, BLOCK_D=128, BLOCK_N=32, SLAB_D=32, SLAB_STAGES=2, STAGES=3, num_warps=8
)  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The three folders that tables are looked for in, all empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", str(tmp_path / "override"))
    monkeypatch.setattr(launch_configs, "SHIPPED_FOLDER", tmp_path / "shipped")
    found = {
        "override": tmp_path / "override",
        "user": tmp_path / "cache" / "reft_kernels" / "configs",
        "shipped": tmp_path / "shipped",
    }
    for folder in found.values():
        folder.mkdir(parents=True)
    launch_configs.reload()
    yield found
    launch_configs.reload()


def key(**changes: Any) -> Key:
    values = {"op": "edit_forward", "h": "bfloat16", "parameters": "float32", "linear": True, "d": 4096, "r": 4}
    return Key(**{**values, "N": 448, **changes})


def marked(number: int) -> ForwardConfig:
    """A configuration of its own for each number below 64."""
    return FORWARD._replace(BLOCK_N=1 << number % 8, STAGES=1 + number // 8)


def write(folder: Path, entries: dict[Key, Config], file: str = FILE) -> Path:
    folder.joinpath(file).write_text(format_table(HEADER, {k: Entry(c, 1.0) for k, c in entries.items()}))
    launch_configs.reload()
    return folder / file


def lookup(device: str = DEVICE, **changes: Any) -> Config | None:
    """The configuration for one launch; the arguments of :func:`key`, grouped and dropout."""
    more = {name: changes.pop(name) for name in ("grouped", "dropout") if name in changes}
    wanted = key(**changes)
    h, parameters = getattr(torch, wanted.h), getattr(torch, wanted.parameters)
    return launch_configs.lookup(
        wanted.op, device, N=wanted.N, d=wanted.d, r=wanted.r, h=h, parameters=parameters, linear=wanted.linear,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "stem"),
    [
        (DEVICE, "nvidia_h100_80gb_hbm3"),
        ("NVIDIA H100 PCIe", "nvidia_h100_pcie"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "nvidia_h100_80gb_hbm3_mig_1g_10gb"),
        ("../../etc", "etc"),
    ],
)
def test_a_file_is_named_after_its_device(device: str, stem: str) -> None:
    assert slug(device) == stem


def test_without_a_table_nothing_is_found_and_nothing_said(folders: dict[str, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup() is None
        assert launch_configs.describe(DEVICE) == "heuristic (no table for this device)"


def test_every_part_of_the_key_counts(folders: dict[str, Path]) -> None:
    write(folders["user"], {key(): FORWARD, key(op="edit_backward"): BACKWARD})
    assert lookup() == FORWARD
    assert lookup(op="edit_backward") == BACKWARD
    for other in ({"h": "float16"}, {"parameters": "bfloat16"}, {"linear": False}, {"grouped": True}, {"dropout": 0.1}):
        assert lookup(**other) is None, other
    assert lookup("NVIDIA H100 PCIe") is None


def test_n_is_the_nearest_in_log_space(folders: dict[str, Path]) -> None:
    sizes = (32, 448, 4096, 65536)
    write(folders["user"], {key(N=n): marked(i) for i, n in enumerate(sizes)})
    # The geometric mean of 32 and 448 is 119.7, of 448 and 4096 it is 1354.6, of 4096 and 65536 exactly 16384.
    for n, expected in [
        (1, 0), (32, 0), (119, 0), (120, 1), (448, 1), (1354, 1), (1355, 2), (4096, 2),
        (16384, 2), (16385, 3), (65536, 3), (65536 * 32, 3),
    ]:  # fmt: skip
        assert lookup(N=n) == marked(expected), n
    assert lookup(N=65536 * 32 + 1) is None
    write(folders["user"], {key(N=64): marked(0), key(N=2**20): marked(1)})
    assert [lookup(N=n) for n in (1, 2, 2048, 2049)] == [None, marked(0), marked(0), None]
    assert [lookup(N=n) for n in (2**15 - 1, 2**15)] == [None, marked(1)]


def test_d_and_r_are_of_the_same_power_of_two(folders: dict[str, Path]) -> None:
    write(
        folders["user"],
        {
            key(d=4096, r=8): marked(0), key(d=4096, r=6): marked(1), key(d=2560, r=8): marked(2),
            key(d=4096, r=4): marked(3), key(d=768, r=1): marked(4),
        },
    )  # fmt: skip
    # The geometric mean of 2560 and 4096 is 3238.2.
    for (d, r), expected in {
        (4096, 8): 0, (4096, 7): 1, (4096, 6): 1, (4096, 5): 1, (4096, 4): 3, (4096, 3): 3, (2560, 8): 2,
        (2049, 5): 2, (3238, 8): 2, (3239, 8): 0, (1024, 1): 4, (513, 1): 4,
    }.items():  # fmt: skip
        assert lookup(d=d, r=r) == marked(expected), (d, r)
    for d, r in ((4097, 8), (2048, 8), (4096, 9), (4096, 16), (4096, 2), (4096, 1), (512, 1), (1025, 1), (768, 2)):
        assert lookup(d=d, r=r) is None, (d, r)


def test_lookups_return_no_more_configurations_than_the_table_has(folders: dict[str, Path]) -> None:
    shapes = [(n, d, r) for n in (16, 448, 9000) for d in (768, 4096) for r in (1, 4, 64)]
    table = {key(N=n, d=d, r=r): marked(i) for i, (n, d, r) in enumerate(shapes)}
    write(folders["user"], table)
    draw = random.Random(3)
    ranks = (1, 3, 4, 5, 33, 64)
    found = {
        lookup(N=int(2 ** draw.uniform(0, 22)), d=draw.randint(1, 9000), r=draw.choice(ranks)) for _ in range(20000)
    }
    assert found - {None} == set(table.values())


def test_an_earlier_folder_stands_before_a_later_one_entry_by_entry(folders: dict[str, Path]) -> None:
    write(folders["shipped"], {key(N=n): marked(0) for n in (32, 448, 4096)})
    write(folders["user"], {key(N=n): marked(1) for n in (32, 448)})
    write(folders["override"], {key(N=32): marked(2)})
    assert [lookup(N=n) for n in (32, 448, 4096)] == [marked(2), marked(1), marked(0)]
    said = launch_configs.describe(DEVICE)
    assert [said.index(str(folder / FILE)) for folder in folders.values()] == sorted(
        said.index(str(folder / FILE)) for folder in folders.values()
    )
    assert "1 entries of 2025-01-01, Triton 1.0; " in said


def test_tables_are_read_once(folders: dict[str, Path]) -> None:
    path = write(folders["user"], {key(): marked(0)})
    assert lookup() == marked(0)
    path.write_text(format_table(HEADER, {key(): Entry(marked(1), 1.0)}))
    assert lookup() == marked(0)
    launch_configs.reload()
    assert lookup() == marked(1)


def test_the_users_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert launch_configs.user_folder() == tmp_path / ".cache" / "reft_kernels" / "configs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert launch_configs.user_folder() == tmp_path / "own" / "reft_kernels" / "configs"


def spoil(change: Callable[[dict[str, Any]], object]) -> str:
    """The text of a table of one good entry, after a change."""
    data = json.loads(format_table(HEADER, {key(): Entry(FORWARD, 1.0)}))
    change(data)
    return json.dumps(data)


BROKEN = {
    "no JSON": ("{", "expected JSON"),
    "no text": ("\udcff", "expected JSON"),
    "deep": ("[" * 100000, "expected JSON"),
    "a list": ("[]", "the file: expected an object, got 'list'"),
    "format": (spoil(lambda t: t.update(format=2)), "format: expected 1, got 2"),
    "format missing": (spoil(lambda t: t.pop("format")), "format: expected 1, got None"),
    "header missing": (spoil(lambda t: t.pop("triton")), "the file: missing triton"),
    "header unknown": (spoil(lambda t: t.update(code="x")), "the file: expected no fields but .* got 'code'"),
    "header type": (spoil(lambda t: t.update(torch=2)), "torch: expected a string, got 2"),
    "entries": (spoil(lambda t: t.update(entries={})), "entries: expected a list"),
    "entry": (spoil(lambda t: t["entries"].append(3)), "entry 2: it: expected an object, got 3"),
    "entry twice": (spoil(lambda t: t["entries"].append(t["entries"][0])), r"entry 2 \(edit_forward .* N=448\): its"),
    "entry field": (spoil(lambda t: t["entries"][0].update(x=1)), "entry 1: it: expected no fields but"),
    "entry missing": (spoil(lambda t: t["entries"][0].pop("us")), "entry 1: it: missing us"),
    "op": (spoil(lambda t: t["entries"][0].update(op="edit")), "entry 1: op: expected one of edit_forward"),
    "op type": (spoil(lambda t: t["entries"][0].update(op=[])), "entry 1: op: expected one of edit_forward"),
    "dtype": (spoil(lambda t: t["entries"][0].update(h="int8")), "entry 1: h: expected one of float32"),
    "linear": (spoil(lambda t: t["entries"][0].update(linear=1)), "entry 1: linear: expected true or false, got 1"),
    "N": (spoil(lambda t: t["entries"][0].update(N=0)), "entry 1: N: expected a positive integer, got 0"),
    "d": (spoil(lambda t: t["entries"][0].update(d=True)), "entry 1: d: expected a positive integer, got True"),
    "us": (spoil(lambda t: t["entries"][0].update(us=float("nan"))), "entry 1: us: expected a positive number"),
    "config": (spoil(lambda t: t["entries"][0].update(config=[])), "entry 1: config: expected an object"),
    "config field": (spoil(lambda t: t["entries"][0]["config"].update(X=1)), "entry 1: config: .* got 'X'"),
    "config missing": (
        spoil(lambda t: t["entries"][0]["config"].pop("num_warps")), "entry 1: config: missing num_warps",
    ),
    "config value": (
        spoil(lambda t: t["entries"][0]["config"].update(BLOCK_N=3)), "BLOCK_N: expected one of 1, 2, 4, .* got 3",
    ),
    "config type": (
        spoil(lambda t: t["entries"][0]["config"].update(STAGES=True)), "STAGES: expected .* got True",
    ),
    "config unfit": (
        spoil(lambda t: t["entries"][0]["config"].update(BLOCK_D=2048)), "BLOCK_D: expected at least d = 4096",
    ),
    "config dot": (
        spoil(lambda t: t["entries"][0]["config"].update(METHOD="tiles")), "BLOCK_N: expected at least 16 .* got 1",
    ),
    "config method": (
        spoil(lambda t: t["entries"][0]["config"].update(METHOD="import os")), "METHOD: expected one of rows, ",
    ),
    "config weights": (
        spoil(lambda t: t["entries"][0]["config"].update(METHOD="weights", BLOCK_N=2)), "BLOCK_N: expected 1 with",
    ),
    "config float": (
        spoil(lambda t: t["entries"][0]["config"].update(num_warps=4.0)), "num_warps: expected .* got 4.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_raises_where_it_was_asked_for_and_warns_in_the_cache(
    case: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = BROKEN[case]
    for name in ("override", "user"):
        (folders[name] / FILE).write_text(text, encoding="utf-8", errors="surrogateescape")
    write(folders["shipped"], {key(): marked(5)})
    with pytest.raises(TableError, match=message) as caught:
        lookup()
    assert str(caught.value).startswith(f"{folders['override'] / FILE}: ")
    monkeypatch.delenv("REFT_KERNELS_CONFIG_DIR")
    launch_configs.reload()
    with pytest.warns(RuntimeWarning, match=message) as warned:
        assert lookup() == marked(5)
    assert str(folders["user"] / FILE) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(N=33) == marked(5)
        assert lookup(d=4095) == marked(5)


def test_what_cannot_be_read_is_a_broken_table(folders: dict[str, Path]) -> None:
    (folders["override"] / FILE).mkdir()
    with pytest.raises(TableError, match=f"{FILE}: cannot be read: "):
        lookup()


def test_a_folder_that_was_asked_for_has_to_be_there(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", str(folders["override"] / "none"))
    with pytest.raises(TableError, match=r"REFT_KERNELS_CONFIG_DIR: expected a folder, got '.*none'"):
        lookup()
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", "")
    assert lookup() is None


def test_a_table_survives_being_written_and_read(tmp_path: Path) -> None:
    entries = {
        key(N=n, op=op, linear=linear, r=r): Entry(config, 2.5)
        for n in (32, 448) for r in (4, 16) for linear in (True, False)
        for op, config in (("edit_forward", FORWARD), ("edit_backward", BACKWARD))
    }  # fmt: skip
    text = format_table(HEADER, entries)
    assert text == format_table(HEADER, dict(reversed(entries.items())))
    path = tmp_path / FILE
    path.write_text(text)
    table = read_table(path)
    assert (table.path, table.header, table.entries) == (path, HEADER, entries)
    lines = [line for line in text.splitlines() if '"op"' in line]
    assert len(lines) == len(entries)
    assert [json.loads(line.rstrip(","))["N"] for line in lines[:2]] == [32, 448]
    path.write_text(format_table(HEADER, {}))
    assert read_table(path).entries == {}


@pytest.mark.parametrize("op", config_tables.CONFIGS)
def test_every_field_has_a_range_that_holds(op: str) -> None:
    config = {"edit_forward": FORWARD, "edit_backward": BACKWARD}[op]
    ranges = config_tables.choices(op)
    assert set(ranges) == set(config._fields)
    for name, allowed in ranges.items():
        for value in allowed:
            assert make_config(op, {**config._asdict(), name: value}) == config._replace(**{name: value})
        beyond = ["", "Rows"] if name == "METHOD" else [min(allowed) - 1, max(allowed) * 2, str(allowed[0]), True]
        for value in (*beyond, 0.5, None, []):
            with pytest.raises(ValueError, match=f"^{name}: expected one of"):
                make_config(op, {**config._asdict(), name: value})


def test_use_config_is_seen_in_every_thread_and_ends(folders: dict[str, Path]) -> None:
    write(folders["user"], {key(): marked(0), key(op="edit_backward"): BACKWARD})
    seen = []
    with launch_configs.use_config("edit_forward", marked(1)):
        thread = threading.Thread(target=lambda: seen.append(lookup(grouped=True)))
        thread.start()
        thread.join()
        with launch_configs.use_config("edit_forward", marked(2)):
            assert lookup("cpu") == marked(2)
        assert lookup() == marked(1)
        assert lookup(op="edit_backward") == BACKWARD
    assert seen == [marked(1)]
    assert lookup() == marked(0)
    with pytest.raises(RuntimeError, match="stop"), launch_configs.use_config("edit_forward", marked(3)):
        raise RuntimeError("stop")
    assert lookup() == marked(0)


def test_a_configuration_that_does_not_cover_the_row_is_refused() -> None:
    small = FORWARD._replace(BLOCK_D=4096)
    with launch_configs.use_config("edit_forward", small):
        assert lookup(d=4096) == small
        with pytest.raises(ValueError, match=r"use_config: BLOCK_D: expected at least d = 4097 .* got 4096"):
            lookup(d=4097)
    held = FORWARD._replace(METHOD="weights")
    with launch_configs.use_config("edit_forward", held):
        assert lookup() == held
        with pytest.raises(ValueError, match=r"use_config: METHOD: expected .* got \"weights\""):
            lookup(grouped=True)
    dot = BACKWARD._replace(BLOCK_D=16)
    assert config_tables.misfit(dot, 4096) is None
    assert "ROWS_N: expected at least 16" in str(config_tables.misfit(dot._replace(ROWS_N=8), 4096))
    assert "BLOCK_D: expected at least 16" in str(config_tables.misfit(dot._replace(BLOCK_D=8), 4096))
    assert "BLOCK_D: expected at least d = 4096" in str(config_tables.misfit(dot._replace(METHOD="rows"), 4096))


def test_use_config_takes_its_own_op_only() -> None:
    with pytest.raises(TypeError, match="expected a ForwardConfig for edit_forward, got BackwardConfig"):
        launch_configs.use_config("edit_forward", BACKWARD).__enter__()
    with pytest.raises(ValueError, match="op: expected one of edit_forward, edit_backward, got 'edit'"):
        launch_configs.use_config("edit", FORWARD).__enter__()


def test_devices_without_a_name_go_by_their_type() -> None:
    assert launch_configs.device_name(torch.device("cpu")) == "cpu"
    assert launch_configs.device_name(torch.device("meta")) == "meta"


@pytest.mark.parametrize("path", sorted(launch_configs.SHIPPED_FOLDER.glob("*")), ids=lambda path: path.name)
def test_shipped_tables_are_whole_and_in_their_form(path: Path) -> None:
    table = read_table(path)
    assert path.name == f"{slug(table.header['device'])}.json"
    assert path.read_text() == format_table(table.header, table.entries)


def test_tables_need_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from reft_kernels.triton import launch_configs\n"
        "print(launch_configs.describe('no such device'))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "heuristic (no table for this device)\n", ran.stderr
