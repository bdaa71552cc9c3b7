"""The tests can fail: each line broken below is caught by a small matrix of edits.

A copy of the package with one broken line runs :func:`check_backend` in a process of its own; the unbroken copy must
pass it. A mutant whose line is no longer in the source fails too: change the list with the kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD, COMMON, EAGER = (
    "triton/edit_forward.py", "triton/edit_backward.py", "triton/common.py", "backends/eager.py",
)  # fmt: skip

# file, the line or a part of it, what stands there instead; the first occurrence is replaced
MUTANTS = [
    # the forward kernel
    (FORWARD, "i_g = tl.where(edited, i_g, 0)", "i_g = i_g * 0"),
    (FORWARD, "h_row = h_ptr + i_b * stride_h_b +", "h_row = h_ptr + i_b * stride_h_b * 0 +"),
    (FORWARD, "y_row = y_ptr + i_b * stride_y_b + i_s * stride_y_s",
     "y_row = y_ptr + i_b * stride_y_b + i_p * stride_y_s"),
    (FORWARD, 'if SUBTRACT and ACTIVATION == "linear":', 'if False and ACTIVATION == "linear":'),
    (FORWARD, "b_s += tl.sum(b_W * b_h[None, :], axis=1)", "b_s = tl.sum(b_W * b_h[None, :], axis=1)"),
    (FORWARD, "b_q += tl.sum(b_R * b_h[None, :], axis=1)", "pass"),
    (FORWARD, "b_s += tl.load(b_ptr + i_g * r + o_r,", "b_s += tl.load(b_ptr + o_r,"),
    (FORWARD, "b_q += tl.load(c_ptr + i_g * r + o_r,", "b_q -= tl.load(c_ptr + i_g * r + o_r,"),
    (FORWARD, "activate(b_s, ACTIVATION) - b_q", "activate(b_s, ACTIVATION) + b_q"),
    (FORWARD, "b_delta *= tl.load(scale_ptr", "b_delta = b_delta + 0 * tl.load(scale_ptr"),
    (FORWARD, "b_y * keep_gain, 0)", "b_y, 0)"),
    (FORWARD, "o_block = i_d // 4 +", "o_block = 0 * i_d +"),
    (FORWARD, "keep_mask(seed, i_b * S + i_s,", "keep_mask(seed, i_n,"),
    (FORWARD, "tl.store(before_ptr + i_n * d + o_d, b_before, mask=m_d)",
     "tl.store(before_ptr + i_n * d + o_d, b_after, mask=m_d)"),
    (FORWARD, "b_after = tl.where(edited, b_after, b_before)", "pass"),
    (FORWARD, "tl.store(y_row + o_d, b_after, mask=m_d)", "tl.store(y_row + o_d, b_after)"),
    # the backward kernel
    (BACKWARD, "b_g = tl.where(m_keep, b_g * keep_gain, 0)", "b_g = tl.where(m_keep, b_g, 0)"),
    (BACKWARD, "b_gd *= tl.load(scale_ptr", "b_gd = b_gd + 0 * tl.load(scale_ptr"),
    (BACKWARD, "b_gd * activation_slope(b_s, ACTIVATION)", "b_gd"),
    (BACKWARD, "weights = i_g * r * d +", "weights = 0 * i_g +"),
    (BACKWARD, "b_A -= b_R", "pass"),
    (BACKWARD, "m_n = m_n & (i_g == i_own)", "m_n = m_n & (i_g >= 0)"),
    (BACKWARD, "b_sum_gs += tl.sum(b_gs, axis=0)", "b_sum_gs = tl.sum(b_gs, axis=0)"),
    (BACKWARD, "b_sum_gd += tl.sum(b_gd, axis=0)", "b_sum_gd += tl.sum(b_gs, axis=0)"),
    (BACKWARD, "o_block = i_slab * (SLAB_D // 4) +", "o_block = 0 * i_slab +"),
    (BACKWARD, "b_delta *= tl.load(scale_ptr", "b_delta += 0 * tl.load(scale_ptr"),
    (BACKWARD, "b_up += tl.dot(", "b_up = tl.dot("),
    (BACKWARD, "o_x = o_n[:, None] * d + o_d[None, :]", "o_x = i_s[:, None] * d + o_d[None, :]"),
    (BACKWARD, "i_s * stride_x_s)", "i_p * stride_x_s)"),
    (BACKWARD, "b_down += tl.dot(tl.trans(b_gs)", "b_down += tl.dot(tl.trans(b_gd)"),
    (BACKWARD, "b_cross += tl.dot(", "b_cross -= tl.dot("),
    (BACKWARD, "b_dh -= tl.dot(b_gd, b_R,", "b_dh += tl.dot(b_gd, b_R,"),
    (BACKWARD, "b_dR -= b_down", "pass"),
    (BACKWARD, "b_dR -= b_cross", "pass"),
    (BACKWARD, "if i_slab == 0:", "if i_slab == 1:"),
    (BACKWARD, "(-b_sum_gd)", "b_sum_gd"),
    (BACKWARD, "i_own = tl.full((), 0, tl.int64) + i_item // n_slabs",
     "i_own = tl.full((), 0, tl.int64) + i_item // (n_slabs + 1)"),
    # what both share
    (COMMON, "m_edited = m_edited & (i_s >= 0) & (i_s < S)", "m_edited = m_edited & (i_s < S)"),
    (COMMON, "m_edited = m_edited & (i_g >= 0) & (i_g < G)", "m_edited = m_edited & (i_g < G)"),
    (COMMON, "tl.interleave(tl.interleave(w0, w2)", "tl.interleave(tl.interleave(w1, w2)"),
    (COMMON, "i_p = o_n % P", "i_p = o_n % (P + 1)"),
    (COMMON, "o_position = i_b * stride_positions_b + i_p * stride_positions_p", "o_position = o_n"),
    # the eager backend
    (EAGER, "delta = delta.add(_pick(bias, group).to(dtype), alpha=sign)",
     "delta = delta.add(_pick(bias, group).to(dtype))"),
    (EAGER, "delta = delta - _down(x, p.R.to(dtype), group)", "pass"),
    (EAGER, "scaled = delta if p.scale is None else delta * p.scale.reshape(-1, 1).to(dtype)", "scaled = delta"),
    (EAGER, "after = after.mul_(_keep_factor(p, p.h.shape, dtype))", "pass"),
    (EAGER, "g = g * _keep_factor(p, grad.shape, dtype)", "pass"),
    (EAGER, "gd = gd * p.scale.reshape(-1, 1).to(dtype)", "pass"),
    (EAGER, "gd * activation_slope(s, p.activation)", "gd"),
    (EAGER, "after = after - _up(gd, R, group)", "pass"),
    (EAGER, "after = after + _up(gs, p.W.to(dtype), group)", "pass"),
    (EAGER, "dR -= dW if shared", "dR = dR if shared"),
    (EAGER, "db = _sum_by_group(gs,", "db = _sum_by_group(gd,"),
    (EAGER, "dc = -_sum_by_group", "dc = _sum_by_group"),
    (EAGER, "(p.positions >= 0) & (p.positions < length)", "(p.positions < length)"),
    (EAGER, "before.clone() if p.positions is None else before", "before"),
    (EAGER, "rows = batch * shape[1] + position", "rows = batch + position"),
    (EAGER, "dR = _outer(scaled, g, group, groups)", "dR = _outer(delta, g, group, groups)"),
    (EAGER, "x = x.where(edited[:, None], 0)", "pass"),
    (EAGER, "own = (group == g)[:, None]", "own = (group >= g)[:, None]"),
    (EAGER, "return p.W.to(wide) - p.R.to(wide) if p.subtract else p.W.to(wide)", "return p.W.to(wide)"),
]  # fmt: skip


def check_backend(backend: str) -> None:
    """Edits of every feature, forward and backward, against the float64 oracle. Needs the package alone."""
    from dataclasses import replace

    import torch

    from reft_kernels.testing import (
        EditCase,
        assert_bitwise_equal,
        assert_close,
        gradients,
        poison_empty,
        random_edit,
    )

    everything = EditCase(
        "noreft_with_c", "gelu", positions="padded", groups=2, scale="rows",
        shape=(2, 4), slots=3, d=70, r=3, layout="slice",
    )  # fmt: skip
    # The cheap ones first: most mutants go no further.
    cases = [
        (everything, False),
        (replace(everything, activation="linear"), False),
        (replace(everything, activation="linear", positions="none", shape=(2, 3), dropout=0.3), False),
        (replace(everything, method="loreft", index="strided", shape=(3, 4)), True),
        (replace(everything, shape=(2, 3), slots=2, dropout=0.3), False),
        (replace(everything, shape=(2,), positions="none", groups=0, d=8), False),
        (EditCase("noreft_with_c", "linear", shape=(1,), d=2100, r=4, dropout=0.3), False),
        (EditCase("noreft_with_c", "tanh", shape=(1,), d=2100, r=4), False),
        (replace(everything, shape=(1, 35), positions="none", groups=0, scale="none", d=40), True),
    ]
    for number, (case, inplace) in enumerate(cases):
        o = random_edit(case, seed=number + 1)
        grad = torch.randn(o.h.shape, generator=torch.Generator().manual_seed(number))
        grad = grad.where(o.named[..., None], float("nan"))

        def edited(o=o, inplace=inplace, **t: torch.Tensor) -> torch.Tensor:
            own = {**t, "h": t["h"].clone()} if inplace else t
            return o.edit(**own, backend=backend, inplace=inplace)

        with poison_empty():
            got = gradients(edited, o, grad)
        clean = grad.nan_to_num(0.0)
        wide = o.to(torch.float64)
        plain = gradients(lambda o=o, **t: o.reference(torch.float32, **t), o, clean)
        oracle = gradients(lambda o=wide, **t: o.reference(**t), wide, clean)
        named = o.named
        assert_bitwise_equal(got.y[~named], o.h[~named], name="unnamed rows")
        assert_close(got.y[named], oracle.y[named], plain.y[named], name="y")
        for name, value in got.grads.items():
            rows = named if name == "h" else ...
            assert_close(value[rows], oracle.grads[name][rows], plain.grads[name][rows], factor=3, name=f"d{name}")


# Imports torch and Triton once and forks a process for each mutant's copy of the package. A broken mask or offset may
# write anywhere: a mutant that dies of it, or hangs on a broken heap until its alarm, is caught too.
RUNNER = """
import os, signal, sys
import torch, triton, numpy
torch.set_num_threads(1)
for line in sys.stdin:
    folder, backend = line.split()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            sys.path[:0] = [folder, TESTS]
            from test_edit_mutants import check_backend
            check_backend(backend)
            import reft_kernels
            assert reft_kernels.__file__.startswith(folder)
            status = 0
        except BaseException as error:
            print(folder, "caught", type(error).__name__, str(error).split("\\n")[0][:200], flush=True)
        os._exit(status)
    _, status = os.waitpid(child, 0)
    print(folder, "passed" if status == 0 else "failed", flush=True)
"""


def mutate(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / "reft_kernels" / file
    source = path.read_text()
    assert old in source, f"not in {file} any more: {old}"
    path.write_text(source.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_every_mutant_is_caught(tmp_path: Path, backend: str) -> None:
    chosen = [m for m in MUTANTS if (m[0] == EAGER) == (backend == "eager")]
    folders = []
    for number in range(len(chosen) + 1):
        folder = tmp_path / str(number)
        shutil.copytree(
            ROOT / "reft_kernels",
            folder / "reft_kernels",
            ignore=shutil.ignore_patterns("__pycache__", "training", "cli"),
        )
        if number:
            mutate(folder, *chosen[number - 1])
        folders.append(folder)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER.replace("TESTS", repr(str(ROOT / "python_tests")))],
        input="".join(f"{folder} {backend}\n" for folder in folders),
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdicts = dict(line.split()[:2] for line in done.stdout.splitlines() if line.split()[1] in ("passed", "failed"))
    assert len(verdicts) == len(folders), done.stdout + done.stderr
    assert verdicts[str(folders[0])] == "passed", f"the unbroken package fails:\n{done.stdout}"
    survivors = [
        f"{file}: {old!r} -> {new!r}"
        for folder, (file, old, new) in zip(folders[1:], chosen, strict=True)
        if verdicts[str(folder)] == "passed"
    ]
    assert not survivors, "these broken lines are not noticed:\n" + "\n".join(survivors)
