"""How many kernels Triton compiles: one for each configuration, however many shapes there are.

The launchers run on tensors of many shapes in a process of its own (in this one the kernels may be bound to the
interpreter), and each launch goes through Triton's own ``JITFunction.run`` up to where it would compile: there its
cache key is counted and nothing is compiled. No GPU is needed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from reft_kernels.backends import triton as launcher
from reft_kernels.triton.config_tables import HEADER as NAMES
from reft_kernels.triton.config_tables import Entry, ForwardConfig, Key, format_table

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("edit_forward", "edit_backward")
D, R = 256, 8
# Rows of the batch and positions in each: 50 different N, among them 1 and multiples of 16.
SHAPES = [(1, n) for n in (1, 2, 3, 5, 7, 8, 11, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 129, 255)] + [
    (batch, n) for batch in (9, 16, 21) for n in (29, 37, 67, 128, 300, 448, 513, 1000, 2048, 4096)
]
RUNTIME = ("N", "P", "S", "G", "chunk")  # what no kernel may be compiled for
SLOTS = ("positions", "group", "scale")
MAX_CONFIGS = 8  # of one kernel, for all of SHAPES


def launched(scenario: str, *mutant: str) -> dict[str, dict[str, int]]:
    """For each kernel and configuration how many kernels a scenario would compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, __file__, scenario, *mutant],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counts: dict[str, dict[str, int]] = json.loads(ran.stdout)
    return counts


@pytest.mark.parametrize("scenario", ["named", "tokens", "groups"])
def test_one_kernel_a_configuration_for_fifty_shapes(scenario: str) -> None:
    assert len({batch * slots for batch, slots in SHAPES}) == 50
    counts = launched(scenario)
    assert set(counts) == set(KERNELS)
    for kernel, by_config in counts.items():
        assert set(by_config.values()) == {1}, (kernel, by_config)
        assert len(by_config) <= MAX_CONFIGS, kernel


@pytest.mark.parametrize("name", RUNTIME)
def test_a_specialised_size_is_noticed(name: str) -> None:
    counts = launched("groups" if name == "G" else "named", name)
    assert max(max(by_config.values()) for by_config in counts.values()) > 1


def test_layouts_add_few_kernels() -> None:
    """400 layouts; only whether h, y and the gradient are aligned, by pointer and strides, may tell kernels apart."""
    for kernel, by_config in launched("layouts").items():
        assert max(by_config.values()) <= 16, (kernel, by_config)


@pytest.mark.parametrize("name", ["stride_positions_b", "group_ptr"])
def test_a_layout_that_is_specialised_on_is_noticed(name: str) -> None:
    plain, mutated = launched("layouts"), launched("layouts", name)
    for kernel, by_config in plain.items():
        assert max(mutated[kernel].values()) > max(by_config.values())


def test_a_table_bounds_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [ForwardConfig("rows", 1 << i, D, 1, 4) for i in range(3)]
    entries = {
        Key("edit_forward", "bfloat16", "float32", True, D, R, n): Entry(config, 1.0)
        for n, config in zip((8, 300, 9000), configs, strict=True)
    }
    header = dict.fromkeys(NAMES, "1")
    (tmp_path / "meta.json").write_text(format_table(header, entries))
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", str(tmp_path))
    assert sorted(launched("named")["edit_forward"].values()) == [1, 1, 1]


class Target:
    """As much of Triton's driver as a launch asks before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Counter:
    """Counts the cache keys of what the launchers launch."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.runtime import driver

        driver.set_active(Target())
        knobs.runtime.jit_cache_hook = self._stop
        self.keys: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in KERNELS}
        self._key = ""

    def _stop(self, *, key: Any, **_: Any) -> bool:
        self._key = str(key)
        return True  # do not compile

    def edit(self, problem: Any, grad: Any) -> None:
        """One forward and one backward."""
        from benchmarks import aot
        from reft_kernels.problem import Needs

        launches: list[tuple[str, Any, dict[str, Any]]] = []
        with aot._recording(launches):
            _, delta, s, _ = launcher.edit_forward(problem, inplace=True, save_rows=False)
            launcher.edit_backward(grad, problem, delta, s, Needs(True, True, True, True, False), inplace=True)
        for name, kernel, arguments in launches:
            runtime = {parameter.name for parameter in kernel.params if not parameter.is_constexpr}
            config = {name: str(value) for name, value in arguments.items() if name not in runtime}
            kernel.run(grid=(1,), warmup=False, **arguments)
            self.keys[name][json.dumps(config, sort_keys=True)].add(self._key)


def edits(scenario: str) -> Any:
    """The edits of a scenario, with the gradients that come back to them."""
    import torch

    from reft_kernels.problem import EditProblem

    rng = random.Random(1)

    def make(h: Any, groups: int, **slots: Any) -> Any:
        on = {"device": h.device}
        return EditProblem(
            h=h,
            R=torch.zeros(groups, R, h.shape[2], **on),
            W=torch.zeros(groups, R, h.shape[2], **on),
            b=torch.zeros(groups, R, **on),
            c=None,
            **{**dict.fromkeys(SLOTS), **slots},
            seed=None,
            subtract=True,
            activation="linear",
            dropout=0.0,
        )

    def view(batch: int, length: int, dtype: Any, d: int = 0) -> Any:
        """A view with odd strides and an odd start, or without."""
        shape, odd, start = (batch, length, d) if d else (batch, length), rng.choice((0, 0, 1, 8)), rng.choice((0, 1))
        if rng.random() < 0.3:
            batch = 1
        wide = shape[-1] + odd
        whole = torch.zeros(start + batch * (length if d else 1) * wide, dtype=dtype)[start:]
        return whole.view(batch, *shape[1:-1], wide)[..., : shape[-1]].expand(shape)

    if scenario == "layouts":
        for _ in range(400):
            batch, length, slots = rng.choice((1, 2, 16)), 32, rng.choice((1, 3, 16))
            dtypes = dict(zip(SLOTS, (torch.int64, torch.int64, torch.float32), strict=True))
            problem = make(
                view(batch, length, torch.bfloat16, 64), 1,
                **{name: view(batch, slots, dtype) for name, dtype in dtypes.items()},
            )  # fmt: skip
            yield problem, view(batch, length, torch.bfloat16, 64)
        return
    for number, (batch, slots) in enumerate(SHAPES):
        # Memory has no part in the keys. Positions are views of a wider tensor: all have the same strides.
        length = slots if scenario == "tokens" else slots + number
        positions = torch.empty(batch, 4999, dtype=torch.int64, device="meta")[:, :slots]
        more = {} if scenario == "tokens" else {"positions": positions}
        groups = 1
        if scenario == "groups":
            more["group"], groups = positions, 1 + number % 5
        h = torch.empty(batch, length, D, dtype=torch.bfloat16, device="meta")
        yield make(h, groups, **more), torch.empty_like(h)


def mutate(names: list[str]) -> None:
    """Specialises on what is a run-time value."""
    kernels = launcher._kernels()
    for kernel in (kernels.forward, kernels.backward):
        for parameter in kernel.params:
            if parameter.name in names:
                parameter.do_not_specialize = False
                parameter.do_not_specialize_on_alignment = False


def main(scenario: str, *mutants: str) -> None:
    """Prints how many keys each configuration has."""
    mutate(list(mutants))
    counter = Counter()
    for problem, grad in edits(scenario):
        counter.edit(problem, grad)
    counts = {name: {config: len(keys) for config, keys in found.items()} for name, found in counter.keys.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
