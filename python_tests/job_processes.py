"""Commands in processes of their own, which tests may kill, interrupt, stop at a place, or give a small disk.

They are forked from a process that has imported everything, which takes most of a command's time.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_PERMITTED = 77
_PRELOADED = ["conftest", "reft_kernels.cli", "reft_kernels.jobs.run", "reft_kernels.jobs.search", "tqdm.auto"]


@dataclass
class Command:
    """A running `python -m reft_kernels`."""

    process: Any
    out: Path
    err: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s; it said {self.said()} {self.complained()}")
        code: int = self.process.exitcode
        return code

    def end(self, number: int) -> int:
        """Sends a signal, and gives the exit code."""
        assert self.process.is_alive(), f"ended before: {self.said()} {self.complained()}"
        os.kill(self.process.pid, number)
        return self.wait()

    def said(self) -> str:
        """Its standard output."""
        return self.out.read_text(encoding="utf-8")

    def complained(self) -> str:
        """Its standard error."""
        return self.err.read_text(encoding="utf-8")

    def errors(self) -> list[str]:
        """The lines of its standard error that it wrote itself: other packages warn there."""
        return [line for line in self.complained().splitlines() if line.startswith(("reft_kernels", "Traceback"))]


def begin(
    argv: Sequence[Any],
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    around: Callable[[], Any] | None = None,
) -> Command:
    """Starts a command.

    Args:
        folder: for what it prints.
        environment: added to this process's.
        around: gives a context manager that the command runs in; a function of a module, or a partial of one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (folder / f"{len(list(folder.glob('*.out')))}.{kind}" for kind in ("out", "err"))
    out.touch()
    process = context.Process(target=_work, args=([str(word) for word in argv], out, err, environment or {}, around))
    process.start()
    return Command(process, out, err)


def _work(argv: list[str], out: Path, err: Path, environment: dict[str, str], around: Any) -> None:
    import torch

    from reft_kernels.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
    with around() if around is not None else _nothing():
        code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _nothing() -> Any:
    yield


def wait_for(path: Path, command: Command, seconds: float = 60) -> None:
    """Waits until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert command.process.is_alive(), f"ended before {path.name}: {command.said()} {command.complained()}"
        assert time.monotonic() < end, f"no {path.name} after {seconds} s: {command.said()}"
        time.sleep(0.005)


@contextmanager
def stopping(place: str, mark: Path, nth: int | None = None) -> Any:
    """Stops the command at a place, and makes the file `mark` when it is there.

    Places: "reading", "loading" (of the model), "step" (the `nth`, by default the fourth), "scoring", and, in the
    second checkpoint, half of "adapter", "optimizer" or "state" written.
    """
    from transformers import trainer_callback

    from reft_kernels import checkpoint
    from reft_kernels.jobs import language, run
    from reft_kernels.training.trainer import ReftTrainer

    def stop(*_args: Any, **_options: Any) -> None:
        mark.touch()
        time.sleep(120)

    places: dict[str, tuple[Any, str, int]] = {
        "reading": (language, "read_all", 1),
        "loading": (run, "load_base", 1),
        "step": (ReftTrainer, "training_step", 4),
        "scoring": (run, "describe_scores", 1),
        "adapter": (checkpoint, "write_safetensors", 2),
        "optimizer": (_torch(), "save", 4),
        "state": (trainer_callback.TrainerState, "save_to_json", 2),
    }
    owner, name, usual_nth = places[place]
    nth = usual_nth if nth is None else nth
    usual = getattr(owner, name)
    calls = 0

    def instead(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and place in ("adapter", "optimizer", "state"):
            usual(*args, **options)
            path = Path(next(arg for arg in args if isinstance(arg, (str, os.PathLike))))
            os.truncate(path, path.stat().st_size // 2)
        if calls == nth:
            stop()
        return usual(*args, **options)

    setattr(owner, name, instead)
    yield


def _torch() -> Any:
    import torch

    return torch


@contextmanager
def small_disk(folder: Path, size: str, copy: Path) -> Any:
    """A disk of so many bytes at `folder`, for this process alone; what is on it in the end is copied to `copy`.

    Ends the process with NOT_PERMITTED where the system does not let it have one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(NOT_PERMITTED)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(NOT_PERMITTED)
    yield
    shutil.copytree(folder, copy)


@contextmanager
def split_on_cpu() -> Any:
    """Lets a model be split or sharded without GPUs, which accelerate refuses, though all below it can do that."""
    import accelerate
    import torch
    from accelerate.state import AcceleratorState

    from reft_kernels.jobs import run

    usual = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        fresh = not AcceleratorState._shared_state
        usual(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fresh and fsdp_plugin is not None:
            self.distributed_type = accelerate.DistributedType.FSDP
            self.device_mesh, self.fsdp_plugin = None, fsdp_plugin

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")  # not "cpu:0", which transformers 4.57 cannot load an optimiser to

    AcceleratorState.__init__ = sharded
    accelerate.PartialState.set_device = set_device
    accelerate.ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    run._check_device = lambda settings, device, resume: None
    yield
