"""Wrong operands: one sentence that names the culprit, before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reft_kernels import edit, explain, set_debug
from reft_kernels.backends import registry

D, R_, G = 8, 2, 3


def good(**changes) -> dict:
    """Operands of a grouped edit with positions, changed as asked; None removes."""
    operands = {
        "h": torch.randn(2, 5, D),
        "R": torch.randn(G, R_, D),
        "W": torch.randn(G, R_, D),
        "b": torch.randn(G, R_),
        "c": torch.randn(G, R_),
        "positions": torch.tensor([[0, 2, -1], [4, 1, 3]]),
        "group": torch.tensor([[0, 1, 2], [-1, 2, 0]]),
        "scale": torch.rand(2, 3),
    }
    return {k: v for k, v in {**operands, **changes}.items() if v is not None}


@pytest.fixture(autouse=True)
def _nothing_launched(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "launches" in request.keywords or "launches" in request.fixturenames:
        return

    def launched(*_, **__):
        raise AssertionError("a backend was called for an edit that has an error")

    for backend in registry.BACKENDS.values():
        monkeypatch.setattr(backend, "edit_forward", launched)


@pytest.fixture
def launches() -> None:
    """For the tests in which edits do run."""


@pytest.fixture
def debug():
    set_debug(True)
    yield
    set_debug(False)


def test_the_operands_changed_below_are_good(launches) -> None:
    assert edit(**good()).shape == (2, 5, D)


META = torch.device("meta")
CASES = [
    # what changes, error, words that the message must hold
    ({"h": [1.0]}, TypeError, ["h: expected a tensor", "got list"]),
    ({"h": torch.ones(2, 5, D, dtype=torch.int64)}, TypeError, ["h: expected", "int64 [2, 5, 8]"]),
    ({"h": torch.ones(2, 5, D, dtype=torch.complex64)}, TypeError, ["h: expected", "complex64"]),
    ({"h": torch.ones(5, D)}, ValueError, ["h: expected [B, S, d]", "[5, 8]"]),
    ({"h": torch.ones(1, 2, 5, D)}, ValueError, ["h: expected [B, S, d]", "[1, 2, 5, 8]"]),
    ({"h": torch.ones(2, 5, D + 1)}, ValueError, ["R: expected", f"d={D + 1}", "[3, 2, 8]"]),
    ({"R": "R"}, TypeError, ["R: expected a tensor", "got str"]),
    ({"R": torch.ones(R_, D)}, ValueError, ["R: expected [G, r, d]", "group", "[2, 8]"]),
    ({"R": torch.ones(G, 0, D), "W": None, "b": None, "c": None}, ValueError, ["R: expected", "r >= 1", "[3, 0, 8]"]),
    ({"R": torch.ones(0, R_, D), "W": None, "b": None, "c": None}, ValueError, ["R: expected", "[0, 2, 8]"]),
    ({"R": torch.ones(G, R_, D, dtype=torch.int32)}, TypeError, ["R: expected", "int32"]),
    ({"W": torch.ones(G, D, R_)}, ValueError, ["W: expected [3, 2, 8]", "[3, 8, 2]"]),
    ({"W": torch.ones(R_, D)}, ValueError, ["W: expected [3, 2, 8]", "[2, 8]"]),
    ({"W": torch.ones(G, R_ + 1, D)}, ValueError, ["W: expected [3, 2, 8]", "[3, 3, 8]"]),
    ({"b": torch.ones(R_)}, ValueError, ["b: expected [3, 2]", "[2]"]),
    ({"b": torch.ones(G, R_, dtype=torch.bool)}, TypeError, ["b: expected", "bool"]),
    ({"c": torch.ones(G, R_, 1)}, ValueError, ["c: expected [3, 2]", "[3, 2, 1]"]),
    ({"subtract": False}, ValueError, ["c:", "subtract"]),
    ({"positions": torch.ones(2, 3)}, TypeError, ["positions: expected", "int64", "float32 [2, 3]"]),
    ({"positions": [[0, 1, 2], [0, 1, 2]]}, TypeError, ["positions: expected a tensor", "got list"]),
    ({"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, ["positions: expected [B, P]", "[3]"]),
    ({"positions": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, ["positions: expected [B, P]", "B=2", "[4, 3]"]),
    ({"group": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, ["group: expected [2, 3]", "[2, 4]"]),
    ({"group": torch.zeros(2, 3)}, TypeError, ["group: expected", "float32"]),
    ({"group": torch.zeros(3, dtype=torch.int64)}, ValueError, ["group: expected [2, 3]", "[3]"]),
    ({"positions": None}, ValueError, ["group: expected [2, 5]", "[2, 3]"]),
    ({"scale": torch.ones(2, 5)}, ValueError, ["scale: expected [2, 3]", "[2, 5]"]),
    ({"scale": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ["scale: expected", "int64"]),
    ({"scale": torch.ones(2, 3, requires_grad=True)}, ValueError, ["scale: is not differentiable"]),
    ({"scale": "strong"}, TypeError, ["scale: expected", "str"]),
    ({"activation": "swish"}, ValueError, ["activation: expected one of linear", "'swish'"]),
    ({"activation": "GELU"}, ValueError, ["activation: expected one of", "'GELU'"]),
    ({"dropout": 1.0}, ValueError, ["dropout: expected a probability in [0, 1)", "1.0"]),
    ({"dropout": -0.1}, ValueError, ["dropout", "-0.1"]),
    ({"dropout": float("nan")}, ValueError, ["dropout", "nan"]),
    ({"dropout": 0.1, "seed": 2**63}, ValueError, ["seed: expected a 64-bit integer"]),
    ({"dropout": 0.1, "seed": torch.tensor([1], dtype=torch.int32)}, TypeError, ["seed: expected", "int32"]),
    ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, TypeError, ["seed: expected", "[2]"]),
    ({"dropout": 0.1, "seed": 1.5}, TypeError, ["seed: expected", "float"]),
    ({"dropout": 0.1, "seed": torch.zeros(1, dtype=torch.int64, device=META)}, ValueError, ["seed:", "cpu", "meta"]),
    *(
        ({name: value.to(META)}, ValueError, [f"{name}: expected on the device of h", "cpu", "meta"])
        for name, value in good().items()
        if name != "h"
    ),
    ({"h": torch.empty(2, 5, D, device=META)}, ValueError, ["device of h, meta", "got cpu"]),
    ({"backend": "cuda9"}, ValueError, ["backend: expected one of auto, triton, cuda, cpu, eager", "'cuda9'"]),
    ({"backend": ""}, ValueError, ["backend: expected one of", "''"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), CASES, ids=[" ".join(case[2])[:60] for case in CASES])
def test_message_names_the_culprit(changes: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        edit(**good(**changes))
    message = str(raised.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert type(raised.value) is error
    if "backend" not in changes:
        with pytest.raises(error):
            explain(**good(**changes))


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ValueError, match=r"h: expected \[\.\.\., d\]"):
        edit(torch.tensor(1.0), torch.ones(1, 1))


def test_rows_of_no_columns() -> None:
    with pytest.raises(ValueError, match=r"(h|R): expected .*d"):
        edit(torch.ones(3, 0), torch.ones(1, 0))


def test_rank_beyond_the_kernels_is_named_not_replaced() -> None:
    h, R = torch.randn(2, 128), torch.randn(65, 128)
    with pytest.raises(ValueError, match=r"backend='triton' cannot take this edit: takes ranks up to 64, got r=65"):
        edit(h, R, backend="triton")


def test_rank_beyond_the_kernels_runs_elsewhere(launches) -> None:
    h, R = torch.randn(2, 128), torch.randn(65, 128)
    torch.testing.assert_close(edit(h, R), h - h @ R.T @ R, rtol=1e-4, atol=1e-3)
    said = explain(h, R)
    assert said["eager"] == "ok"
    assert "65" in said["triton"]


def test_triton_does_not_take_a_device_it_cannot_run_on() -> None:
    h, R = torch.empty(2, 16, device=META), torch.empty(2, 16, device=META)
    with pytest.raises(ValueError, match=r"backend='triton' cannot take this edit: .*meta"):
        edit(h, R, backend="triton")


def test_explain_does_not_disturb_the_generator() -> None:
    state = torch.get_rng_state()
    explain(torch.randn(2, 8, generator=torch.Generator()), torch.ones(1, 8), dropout=0.5)
    assert torch.equal(torch.get_rng_state(), state)


# Debug mode reads positions and groups back.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": torch.tensor([[0, 2, -1], [4, 5, 3]])}, ["positions:", "S=5", "got 5 at [1, 1]"]),
        ({"positions": torch.tensor([[0, 2, -2], [4, 1, 3]])}, ["positions:", "got -2 at [0, 2]"]),
        ({"positions": torch.tensor([[0, 2, -1], [4, 1, 4]])}, ["positions:", "got 4 twice in batch row 1"]),
        ({"positions": torch.tensor([[0, 2, 0], [4, 1, 3]], dtype=torch.int32)}, ["positions:", "got 0 twice"]),
        ({"group": torch.tensor([[0, 1, 3], [-1, 2, 0]])}, ["group:", "G=3", "got 3 at [0, 2]"]),
        ({"group": torch.tensor([[0, 1, 2], [-5, 2, 0]])}, ["group:", "got -5 at [1, 0]"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_debug_mode_checks_contents(debug, backend: str, changes: dict, words: list[str]) -> None:
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r".") as raised:
            edit(**good(**changes), backend=backend, inplace=inplace)
        for word in words:
            assert word in str(raised.value)


def test_debug_mode_lets_good_edits_pass(launches, debug) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    for changes in (
        {},
        {"positions": torch.tensor([[-1, -1, -1], [-1, 0, -1]])},
        {"h": torch.randn(2, 3, D), "positions": None},
        {"h": torch.randn(2, 5, D), "positions": none, "group": none, "scale": torch.zeros(2, 0)},
    ):
        operands = good(**changes)
        checked = edit(**operands)
        set_debug(False)
        assert torch.equal(checked, edit(**operands))
        set_debug(True)


def test_without_debug_mode_nothing_is_read_back(launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host synchronisation: nothing of a tensor reaches Python."""
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            assert name not in {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "__index__", "cpu",
                                "numpy", "unique", "masked_select"}, name  # fmt: skip
            return func(*args, **(kwargs or {}))

    for changes in ({}, {"positions": None, "group": None, "scale": 2.0,
                         **{n: good()[n][0] for n in ("R", "W", "b", "c")}}):  # fmt: skip
        operands = good(**changes)
        for name in ("h", "R", "W", "b", "c"):
            operands[name].requires_grad_()
        with Watch():
            y = edit(**operands, dropout=0.5, activation="gelu", backend="eager")
            y.sum().backward()
    set_debug(True)
    with pytest.raises(AssertionError), Watch():
        edit(**good())
    set_debug(False)


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), ("", "False")])
def test_debug_mode_by_environment(value: str, expected: str) -> None:
    code = "from reft_kernels.debug import debug_is_on; print(debug_is_on())"
    environment = {**os.environ, "REFT_KERNELS_DEBUG": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
