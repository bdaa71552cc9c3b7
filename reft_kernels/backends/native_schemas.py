"""The schemas of the native ops. CMake runs this file as well: it imports nothing of the package."""

from __future__ import annotations

import hashlib

_OPERANDS = (
    "Tensor R, Tensor? W, Tensor? b, Tensor? c, Tensor? positions, Tensor? group, Tensor? scale, Tensor? seed, "
    "bool subtract, int activation, int keep_threshold, float keep_scale"
)
# Every tensor is the caller's: nothing is allocated. `add` has a bit for each of dR, dW, db, dc.
SCHEMAS = (
    f"native_edit_forward(Tensor h, Tensor(a!) y, Tensor(b!) delta, Tensor(c!)? s, Tensor(d!)? rows, {_OPERANDS}, "
    "bool copy_idle) -> ()",
    f"native_edit_backward(Tensor grad, Tensor(a!)? dh, Tensor x, {_OPERANDS}, Tensor delta, Tensor? s, "
    "Tensor(b!) gd, Tensor(c!)? gs, Tensor(d!)? dR, Tensor(e!)? dW, Tensor(f!)? db, Tensor(g!)? dc, int add, "
    "bool rebuild, bool copy_idle, Tensor(h!)? barrier) -> ()",
)
# R and dX hold all matrices, one after the other; workspace is allocated on GPUs alone.
ORTHONORMAL_SCHEMAS = (
    "native_orthonormalize_forward(Tensor[] X, Tensor[] reflectors, Tensor[] signs, Tensor(a!) R, "
    "Tensor(b!) factors, Tensor(c!)? barrier) -> ()",
    "native_orthonormalize_backward(Tensor[] grads, Tensor[] X, Tensor[] reflectors, Tensor[] signs, Tensor factors, "
    "Tensor(a!) dX, Tensor(b!)? barrier) -> ()",
    "native_stiefel_adamw_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, int[] orthonormal, float[] weight_decays, float lr, "
    "Tensor? lr_tensor, float beta1, float beta2, float eps, float max_norm, bool riemannian, bool maximize, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(e!)? norm, Tensor(f!)? barrier) -> ()",
)
# Compiled into the library: an implementation for other schemas would take its arguments for what they are not.
FINGERPRINT = hashlib.sha256("\n".join(SCHEMAS + ORTHONORMAL_SCHEMAS).encode()).hexdigest()[:16]
