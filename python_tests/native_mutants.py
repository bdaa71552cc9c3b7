"""Changes to the sources of the CUDA kernels, all built at once, of which a number chooses one."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from native_machine import CACHE, CSRC, HERE, Library

# file, a statement (ends in ;) or an expression of it, and what stands there instead. The first occurrence is changed,
# or, of a text in several parts, the first of the last part that follows the others.
Mutant = tuple[str, str | tuple[str, ...], str]

FLAGS = ["-w", f"-include {HERE / 'mutant.h'}"]  # of the build of what `mutated` returns

L = TypeVar("L", bound=Library)


def mutated(name: str, mutants: Sequence[Mutant]) -> Path:
    """A copy of csrc with all mutants in it, in a folder of that name."""
    include = Path("include") / "reft_kernels"
    sources = {file: (CSRC / include / file).read_text() for file, _, _ in mutants}
    for number, (file, text, new) in enumerate(mutants, start=1):
        source = sources[file]
        start = end = 0
        for part in (text,) if isinstance(text, str) else text:
            start = source.find(part, end)
            if start < 0:
                raise ValueError(f"mutant {number}: {part!r} is no longer in {file}")
            end = start + len(part)
        old = source[start:end]
        if old.endswith(";"):
            both = f"{{ if (!on_cpu::mutant({number})) {{ {old} }} else {{ {new} }} }}"
        else:
            both = f"(!on_cpu::mutant({number}) ? ({old}) : ({new}))"
        sources[file] = source[:start] + both + source[end:]
    copy = CACHE / f"{name}_csrc"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.copytree(CSRC, copy, dirs_exist_ok=True, ignore=lambda folder, names: [n for n in names if n in sources])
        for file, source in sources.items():
            place = copy / include / file
            if not place.exists() or place.read_text() != source:
                place.write_text(source)
    return copy


def fault_of(machine: L, number: int, cases: Sequence[Callable[[L], object]]) -> str:
    """What the first case says that fails with this mutant; "" if all pass."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(100)
            machine.library.on_cpu_mutant(number)
            for seed, case in enumerate(cases):
                machine.seed(seed)
                case(machine)
        except BaseException as error:
            message = f"case {seed}: {type(error).__name__}: {error}"
        os.write(writing, message.encode()[:60000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        message = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return message if status == 0 else f"ended by signal {os.WTERMSIG(status)}"
