"""What an edit costs beside its arithmetic: calls into ATen, tensors of the full size, time on the host.

Measured with one LoReFT layer (positions, r = 4), calls that make no view, with torch 2.13; the bounds are these.

    eager backend                    forward     backward
    out of place                          17           21
    in place                              16           20
    in place, rebuild                     16           22
    in place, bfloat16                    21           29
    in place, two groups                  26           47

In place none of these allocates a tensor of the size of h, out of place the forward one, for y.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import host_cost
from reft_kernels import ReftConfig, edit, get_reft_model, ownership


class Ledger(TorchDispatchMode):
    """Calls into ATen that make no view, and those of them that make a tensor of at least ``full`` elements."""

    def __init__(self, full: int) -> None:
        super().__init__()
        self.full = full
        self.calls: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        fresh = [t for t in made if t.numel() and t.untyped_storage().data_ptr() not in given]
        name = func.overloadpacket.__name__
        if name != "squeeze_" and (fresh or not made or name[-1] == "_"):  # squeeze_ writes a shape
            self.calls[name] += 1
        for t in fresh:
            if t.numel() >= self.full:
                self.large[f"{func.overloadpacket.__name__} {list(t.shape)}"] += 1
        return result


BATCH, LENGTH, WIDTH, RANK = 2, 32, 16, 4
POSITIONS = torch.tensor([[0, 1, -1], [5, 3, 2]])
GROUP = torch.tensor([[0, 1, 0], [1, 1, 0]])


def cost_of_an_edit(dtype: torch.dtype = torch.float32, groups: int = 0, **how: Any) -> tuple[Ledger, Ledger]:
    """What one edit adds to the forward and to the backward of a graph in which its gradient is nobody else's."""
    lead = (groups,) if groups else ()
    shapes = ((*lead, RANK, WIDTH), (*lead, RANK, WIDTH), (*lead, RANK))
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    source = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype, requires_grad=True)

    def run(function: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> tuple[Ledger, Ledger]:
        forward, backward = Ledger(source.numel()), Ledger(source.numel())
        h = source * 1
        with forward:
            y = function(h)
        loss = (y * 2).square().sum()
        with backward:
            torch.autograd.grad(loss, inputs)
        return forward, backward

    group = GROUP if groups else None
    edited = run(
        lambda h: edit(h, *weights, positions=POSITIONS, group=group, backend="eager", **how), [source, *weights]
    )
    for ledger, plain in zip(edited, run(lambda h: h, [source]), strict=True):
        ledger.calls.subtract(plain.calls)
        ledger.large.subtract(plain.large)
    return edited


# What is asked for, calls forward, calls backward.
BOUNDS: list[tuple[dict[str, Any], int, int]] = [
    ({}, 17, 21),
    ({"inplace": True}, 16, 20),
    ({"inplace": True, "rebuild": True}, 16, 22),
    ({"inplace": True, "dtype": torch.bfloat16}, 21, 29),
    ({"inplace": True, "groups": 2}, 26, 47),
]


@pytest.mark.parametrize(("how", "forward_bound", "backward_bound"), BOUNDS, ids=str)
def test_calls_and_full_size_tensors_of_an_edit(how: dict[str, Any], forward_bound: int, backward_bound: int) -> None:
    cost_of_an_edit(**how)  # measures ownership, once
    forward, backward = cost_of_an_edit(**how)
    assert 0 < forward.calls.total() <= forward_bound, forward.calls
    assert 0 < backward.calls.total() <= backward_bound, backward.calls
    assert +forward.large == ({} if how.get("inplace") else {f"clone [{BATCH}, {LENGTH}, {WIDTH}]": 1})
    assert +backward.large == {}


def test_the_ledger_sees_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not its own is copied, and that counts."""
    monkeypatch.setattr(ownership, "_exclusive", object)
    _, backward = cost_of_an_edit(inplace=True)
    assert +backward.large == {f"clone [{BATCH}, {LENGTH}, {WIDTH}]": 1}


def test_an_edit_of_every_row_in_place_makes_nothing_of_the_full_size_forward() -> None:
    source = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    R, W = (torch.randn(RANK, WIDTH, requires_grad=True) for _ in range(2))
    h = source * 1
    with Ledger(h.numel()) as forward:
        edit(h, R, W, inplace=True, backend="eager")
    assert +forward.large == {}
    h = source * 1
    with Ledger(h.numel()) as forward:
        edit(h, R, W, inplace=True, rebuild=False, backend="eager")
    assert forward.large.total() == 1


# Calls per edited layer in a training step of a whole model, forward and backward, and those of the positions, once.
# Of the 54 the edit makes 22, the additions to the parameters' gradients 3 and the gradient of R's parametrisation 29.
PER_LAYER, ONCE = (16, 54), (22, 0)
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def training_step(layers: Any, changes: dict[str, Any], **settings: Any) -> tuple[Ledger, Ledger, int]:
    """The ledgers of a step of a frozen model whose input embeddings ask for a gradient, and how many layers it has."""
    model = tiny_model("llama", **changes).requires_grad_(False)
    embeddings = torch.randn(2, 12, model.config.hidden_size, requires_grad=True)
    batch = {
        "inputs_embeds": embeddings,
        "labels": torch.randint(3, 50, (2, 12)),
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "use_cache": False,
    }
    called = model
    if layers:
        config = ReftConfig(method="loreft", layers=layers, rank=RANK, positions="f2+l2", **settings)
        called = get_reft_model(model, config)
    for _ in range(2):
        with Ledger(embeddings.numel()) as forward:
            loss = called(**batch).loss
        with Ledger(embeddings.numel()) as backward:
            loss.backward()
    return forward, backward, model.config.num_hidden_layers


@pytest.mark.parametrize("rebuild", [True, False])
@pytest.mark.parametrize("changes", [{}, SMOLLM2], ids=["llama", "smollm2"])
def test_a_training_step_makes_nothing_of_the_full_size_for_the_edits(changes: dict[str, Any], rebuild: bool) -> None:
    *plain, layers = training_step(None, changes)
    *edited, _ = training_step("all", changes, rebuild=rebuild)
    for name, with_edits, without, each, once in zip(
        ("forward", "backward"), edited, plain, PER_LAYER, ONCE, strict=True
    ):
        assert with_edits.large == without.large, name
        extra = with_edits.calls.total() - without.calls.total()
        assert extra <= each * layers + once, (name, extra, with_edits.calls - without.calls)


def test_host_cost_is_no_multiple_of_what_it_was() -> None:
    """Four times the goals of 25 us forward and 60 us for both, above an empty graph; the least of several rounds."""
    times = {name: values[0] for name, values in host_cost.measure(rounds=6, calls=100).items()}
    assert times["edit forward, in place"] < 4 * 25
    assert times["edit forward, out of place"] < 4 * 25
    both = times["edit forward + backward, in place"] - times["graph without an edit, both"]
    assert 0 < both < 4 * 60
