"""Step graphs: what a replay computes is what the step computes. Graphs are recorded on the CPU (recorded_graph.py)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from recorded_graph import recorded_capture
from tiny_models import tiny_model
from torch import Tensor, nn
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments, set_seed

import reft_kernels
from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import (
    ReftTrainerForCausalLM,
    ReftTrainerForSequenceClassification,
    make_supervised_data_module,
)
from reft_kernels.training.data import SupervisedCollator
from reft_kernels.training.frozen_cache import FrozenCache
from reft_kernels.training.packing import PackedCollator
from reft_kernels.training.step_graph_checks import check_step_graphs
from reft_kernels.training.step_graphs import StepGraphs, cuda_capture


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_kernels.training.trainer.cuda_capture", recorded_capture)


class Line(nn.Module):
    """A parameter for a step whose gradient is easily written down."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.calls = 0

    def step(self, x: Tensor, power: int = 1) -> Tensor:
        self.calls += 1
        loss = ((self.w * x) ** power).sum()
        loss.backward()
        return loss.detach()


def of(line: Line, **options: Any) -> StepGraphs:
    return StepGraphs(line.step, line, recorded_capture, **options)


def test_a_shape_that_comes_again_is_replayed() -> None:
    line = Line()
    graphs = of(line)
    for k in range(6):
        line.zero_grad()
        x = torch.arange(3.0) + k
        assert graphs({"x": x}) == x.sum()
        assert line.w.grad is not None
        assert line.w.grad.equal(x)
        assert line.unused.grad is None
    # Two as they are, two for the capture.
    assert line.calls == 4
    assert graphs.stats.graphs == 1


def test_gradients_are_added_whoever_made_them() -> None:
    """Graphs of different shapes share memory, replays write what they wrote before, and steps without a graph."""
    line = Line()
    graphs = of(line, before=1)
    wanted = torch.zeros(3)
    for k, many in enumerate([1, 1, 1, 2, 2, 1, 2, 3, 1, 2, 2]):
        x = torch.arange(3.0).repeat(many, 1) + k
        graphs({"x": x})
        wanted += x.sum(0)
        assert line.w.grad is not None
        assert line.w.grad.equal(wanted)
    assert graphs.stats.graphs == 2


def test_a_gradient_outlives_the_replays_of_other_graphs() -> None:
    line = Line()
    graphs = of(line, before=1)
    for k in range(6):
        line.zero_grad()
        wanted = torch.zeros(3)
        for many in (1, 2, 1):
            x = torch.arange(3.0).repeat(many, 1) + k
            graphs({"x": x})
            wanted += x.sum(0)
        assert line.w.grad is not None
        assert line.w.grad.equal(wanted)


def test_batches_are_left_alone() -> None:
    graphs = of(Line(), before=1)
    batches = [torch.full((3,), float(k)) for k in range(4)]
    for x in batches:
        graphs({"x": x})
    assert [float(x[0]) for x in batches] == [0, 1, 2, 3]


def test_dtypes_and_types_are_parts_of_the_shape() -> None:
    line = Line()
    graphs = StepGraphs(lambda x, power: line.step(x, int(power)), line, recorded_capture, before=1)
    for _ in range(3):
        for x, power in ((torch.ones(3), 1), (torch.ones(3).double(), 1), (torch.ones(3), 1.0), (torch.ones(3), True)):
            line.zero_grad()
            assert graphs({"x": x, "power": power}).dtype == x.dtype
    assert graphs.stats.graphs == 4


def test_a_loss_outlives_the_next_replay() -> None:
    line = Line()
    graphs = of(line, before=1)
    losses = [graphs({"x": torch.full((3,), float(k))}) for k in range(5)]
    assert [float(loss) for loss in losses] == [0.0, 3.0, 6.0, 9.0, 12.0]


def test_what_is_no_tensor_is_a_part_of_the_shape() -> None:
    line = Line()
    graphs = of(line, before=1)
    for power in (1, 2, 1, 2, 1, 2):
        line.zero_grad()
        graphs({"x": torch.arange(3.0), "power": power})
        assert line.w.grad is not None
        assert line.w.grad.equal(torch.arange(3.0) ** power * power)
    assert graphs.stats.graphs == 2
    of(line)({"x": torch.ones(3), "power": torch.tensor(2)})
    line = Line()
    graphs = StepGraphs(lambda x, names: line.step(x), line, recorded_capture, before=1)
    for _ in range(4):
        graphs({"x": torch.ones(3), "names": ["a list is given to no graph"]})
    assert graphs.stats.graphs == 0


def test_there_are_no_more_graphs_than_asked_for() -> None:
    line = Line()
    graphs = of(line, before=1, most=1)
    for _ in range(4):
        for many in (1, 2):
            line.zero_grad()
            graphs({"x": torch.ones(many, 3)})
            assert line.w.grad is not None
            assert line.w.grad.equal(torch.full((3,), float(many)))
    assert graphs.stats.graphs == 1


class Moved(Line):
    """With a second parameter and a buffer that are part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("c", torch.ones(3))

    def step(self, x: Tensor, power: int = 1) -> Tensor:
        loss = (self.w * x * self.v * self.c).sum()
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("name", ["w", "v", "c"])
def test_graphs_of_memory_that_is_gone_are_dropped(name: str) -> None:
    line = Moved()
    graphs = of(line, before=1)
    shapes = ((3,), (2, 3))
    for _ in range(3):
        for shape in shapes:
            graphs({"x": torch.ones(shape)})
    getattr(line, name).data = torch.full((3,), 2.0)
    for shape in shapes:
        line.zero_grad()
        assert graphs({"x": torch.ones(shape)}) == 2 * torch.ones(shape).sum()
        factor = 1 if name == "w" else 2
        assert line.w.grad is not None
        assert line.w.grad.equal(factor * torch.ones(shape).reshape(-1, 3).sum(0))


def test_a_parameter_that_is_unfrozen_later() -> None:
    line = Moved()
    graphs = of(line, before=1)
    for _ in range(3):
        graphs({"x": torch.ones(3)})
    line.v.requires_grad_(True)
    for k in range(3):
        line.zero_grad()
        graphs({"x": torch.full((3,), float(k))})
        assert line.v.grad is not None
        assert line.v.grad.equal(torch.full((3,), float(k)))


def test_running_out_of_memory_stays_what_it_is() -> None:
    line = Line()

    def capture(run: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = StepGraphs(line.step, line, lambda: capture, before=1)
    graphs({"x": torch.ones(3)})
    with pytest.raises(torch.OutOfMemoryError):
        graphs({"x": torch.ones(3)})


def test_a_step_that_reads_a_tensor_cannot_be_captured() -> None:
    line = Line()

    def step(x: Tensor) -> Tensor:
        return line.step(x) if float(x.sum()) > 0 else x

    graphs = StepGraphs(step, line, recorded_capture, before=1)
    graphs({"x": torch.ones(3)})
    kept = line.w.grad
    with pytest.raises(RuntimeError, match=r"\{'x': \[3\]\} cannot be made a CUDA graph: .*Train without step graphs"):
        graphs({"x": torch.ones(3)})
    assert line.w.grad is kept


def test_debug_mode_runs_steps_as_they_are() -> None:
    line = Line()
    graphs = of(line, before=1)
    reft_kernels.set_debug(True)
    try:
        for _ in range(3):
            graphs({"x": torch.ones(3)})
    finally:
        reft_kernels.set_debug(False)
    assert graphs.stats.graphs == 0
    assert line.calls == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="before must be at least 1, got 0"):
        of(Line(), before=0)
    with pytest.raises(ValueError, match="most must be at least 0, got -1"):
        of(Line(), most=-1)
    with pytest.raises(ValueError, match="for CUDA devices, got 'cpu'"):
        cuda_capture(torch.device("cpu"))


# With the Trainer.

TRAININGS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "accumulated, means of means": {"gradient_accumulation_steps": 3, "counts_items": False},
    "every token": {"config": {"positions": None}},
    "polar": {"config": {"orthogonality": "polar"}},
    "direft": {"config": {"method": "nodireft"}},
    "untied": {"config": {"tied": False}},
    "clipped and decayed": {"max_grad_norm": 0.05, "weight_decay": 0.1},
    "bf16": {"bf16": True},
}


def trained(
    tmp_path: Path,
    *,
    graphs: bool,
    config: Any = None,
    collator: Any = None,
    counts_items: bool = True,
    **options: Any,
) -> Any:
    torch.manual_seed(3)
    wanted = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2"} | (config or {})
    model = get_reft_model(make_llama(), ReftConfig(**wanted))
    made = rows(40)
    data = make_supervised_data_module(
        make_tokenizer(), model, [row["instruction"] for row in made], [row["output"] for row in made]
    )
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    set_seed(0)
    trainer = ReftTrainerForCausalLM(
        model, arguments, collator or SupervisedCollator(0, 16), train_dataset=data["train_dataset"], step_graphs=graphs
    )
    trainer.model_accepts_loss_kwargs = counts_items
    trainer.train()
    return trainer


def curve(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_the_same_training(options: dict[str, Any], tmp_path: Path, recorded: None) -> None:
    plain = trained(tmp_path, graphs=False, **options)
    graphed = trained(tmp_path, graphs=True, **options)
    assert graphed.step_graphs.stats.graphs >= 1
    tolerance = 1e-5 if not options.get("bf16") else 2e-2
    assert curve(graphed) == pytest.approx(curve(plain), rel=tolerance)
    assert curve(plain)[-1] < curve(plain)[0]
    pairs = zip(plain.model.interventions.parameters(), graphed.model.interventions.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=100 * tolerance, atol=tolerance)


def test_most_steps_are_replays(tmp_path: Path, recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    step = ReftTrainerForCausalLM._graphed_step
    monkeypatch.setattr(
        ReftTrainerForCausalLM, "_graphed_step", lambda self, **batch: run.append(1) or step(self, **batch)
    )
    trainer = trained(tmp_path, graphs=True)
    assert trainer.state.global_step == 20
    stats = trainer.step_graphs.stats
    assert len(run) <= 4 * stats.shapes < 20
    assert (stats.steps, stats.replayed) == (20, 20 - 2 * stats.shapes)


def test_items_are_no_part_of_the_shape(tmp_path: Path, recorded: None) -> None:
    trainer = trained(tmp_path, graphs=True, max_steps=1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    losses = [float(trainer._step_by_graph(batch, items)) for items in (1, 1, 2, 4, torch.tensor(8))]
    assert losses == pytest.approx([losses[0] / items for items in (1, 1, 2, 4, 8)])
    assert trainer.step_graphs.stats.graphs == 1


def test_packed_rows(tmp_path: Path, recorded: None) -> None:
    plain = trained(tmp_path, graphs=False, collator=PackedCollator(0, 96, pad_to=96))
    graphed = trained(tmp_path, graphs=True, collator=PackedCollator(0, 96, pad_to=96))
    assert graphed.step_graphs.stats.replayed >= 6
    assert curve(graphed) == pytest.approx(curve(plain), rel=1e-5)


def test_every_replay_drops_out_anew(tmp_path: Path, recorded: None) -> None:
    """At a rate of 0 the same batch has another loss at every step, and the mean is that of the step as it is."""
    trainer = trained(tmp_path, graphs=True, config={"dropout": 0.5}, max_steps=1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for intervention in trainer.model.interventions.values():
        nn.init.normal_(intervention.learned_source.weight)
    losses = torch.stack([trainer._step_by_graph(batch) for _ in range(40)])
    assert trainer.step_graphs.stats.graphs == 1
    assert len(losses.unique()) > 30


def test_resuming_draws_the_same_masks(tmp_path: Path, recorded: None) -> None:
    """Whichever steps are replays, dropout's generator goes on alike."""
    found = []
    for before in (2, 7):
        torch.manual_seed(1)
        line = Line()

        def step(x: Tensor, line: Line = line) -> Tensor:
            return line.step(nn.functional.dropout(x, 0.5))

        graphs = StepGraphs(step, line, recorded_capture, before=before)
        found.append([float(graphs({"x": torch.arange(3.0) + k})) for k in range(12)])
    assert found[0] == found[1]


def test_a_replay_is_a_step_of_training(tmp_path: Path, recorded: None) -> None:
    """An evaluation in between leaves model and optimiser in eval mode."""
    trainer = trained(tmp_path, graphs=True, max_steps=1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.optimizer.train = mock.Mock()
    for _ in range(4):
        trainer.model.eval()
        trainer._step_by_graph(batch)
        assert trainer.model.training
    assert trainer.optimizer.train.call_count >= 4


def test_classification(tmp_path: Path, recorded: None) -> None:
    found = []
    for graphs in (False, True):
        set_seed(1)
        model = get_reft_model(
            tiny_model("roberta", num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            ReftConfig(method="loreft", layers="all", rank=2, positions="f1"),
        )
        items = [{"input_ids": torch.randint(3, 50, (7,)), "labels": k % 3} for k in range(24)]
        trainer = ReftTrainerForSequenceClassification(
            model,
            TrainingArguments(
                str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
                report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            ),
            tokenizer=make_tokenizer(pad=True),
            train_dataset=items,
            step_graphs=graphs,
        )  # fmt: skip
        trainer.train()
        found.append(curve(trainer))
    assert trainer.step_graphs.stats.graphs == 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_compiled(tmp_path: Path, recorded: None) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain = trained(tmp_path, graphs=False)
    graphed = trained(tmp_path, graphs=True, **options)
    assert graphed.step_graphs.stats.replayed > 6
    assert curve(graphed) == pytest.approx(curve(plain), rel=1e-5)


REFUSED = {
    "optim 'lomo'": {"optim": "lomo"},
    "optim 'galore_adamw_layerwise'": {"optim": "galore_adamw_layerwise"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile_mode": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it(name: str, tmp_path: Path, recorded: None) -> None:
    with pytest.raises(ValueError, match=f"step_graphs does not go with {name}"):
        trained(tmp_path, graphs=True, **REFUSED[name])


def test_what_reads_a_mask_is_refused(tmp_path: Path, recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_reft_model(make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="l2"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa and eager attention, which read no mask; got 'flash_attention_2'"):
        check_step_graphs(arguments, model.model)
    model.model.config._attn_implementation = "sdpa"
    check_step_graphs(arguments, model.model)
    for name, value in (("fsdp", ["full_shard"]), ("deepspeed", "zero.json")):
        others = copy.copy(arguments)
        setattr(others, name, value)
        with pytest.raises(ValueError, match=f"step_graphs does not go with {name}"):
            check_step_graphs(others, model.model)
    monkeypatch.delattr("transformers.utils.import_utils.is_cuda_stream_capturing")
    with pytest.raises(ValueError, match="step_graphs needs transformers 5"):
        check_step_graphs(arguments, model.model)


def test_a_frozen_cache_does_not_go_with_it(tmp_path: Path, recorded: None) -> None:
    model = get_reft_model(make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="l2"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"frozen_cache looks .* step_graphs"):
        ReftTrainerForCausalLM(
            model, arguments, SupervisedCollator(0), frozen_cache=FrozenCache(model), step_graphs=True
        )


def test_a_cpu_has_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step graphs are for CUDA devices, got 'cpu'"):
        trained(tmp_path, graphs=True)
