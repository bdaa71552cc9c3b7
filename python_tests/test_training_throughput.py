"""Operations of a training step, peak rates, and the speed in the Trainer's logs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainerCallback, TrainingArguments

from reft_kernels import LoreftIntervention, ReftConfig, get_reft_model
from reft_kernels.modules import block_list
from reft_kernels.training import ReftTrainerForCausalLM, make_supervised_data_module
from reft_kernels.training.flops import model_flops
from reft_kernels.training.log_values import LogValues
from reft_kernels.training.peak_rates import measure_matmul, peak_rate, rate_of
from reft_kernels.training.throughput import Throughput, _Counts


def edited(model: Any, layers: str = "all", component: str = "block_output", positions: str = "f2+l2") -> Any:
    return get_reft_model(
        model, ReftConfig(method="loreft", layers=layers, rank=2, positions=positions, component=component)
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_operations_are_those_that_pytorch_counts(architecture: str, first: int) -> None:
    model = tiny_model(architecture, attn_implementation="eager")
    sizes = model_flops(edited(model, str(first)))
    batch, length = 3, 10
    ids = torch.randint(3, 50, (batch, length))
    edit = torch.zeros(16, requires_grad=True)  # in the place of the edit, without products of its own

    def add(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + edit, *output[1:]) if isinstance(output, tuple) else output + edit

    handle = block_list(model)[1][first].register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    handle.remove()
    pairs = batch * length * length  # eager attention forms all of them
    small = counter.get_total_flops() - sizes.training_step(batch * length, pairs, batch * length)
    # Positions' sines are an outer product.
    assert 0 <= small <= 2 * batch * length * 8
    causal = batch * length * (length + 1) // 2
    assert sizes.training_step(batch * length, causal, 0) < sizes.training_step(batch * length, pairs, 0)
    assert sizes.causal
    assert sizes.layers_above == 2 - first


def test_sizes_of_edits_inside_blocks_and_of_trained_weights() -> None:
    below = model_flops(edited(tiny_model("llama"), "1"))
    assert below.layers_above == 1
    assert below.trained == 0
    assert model_flops(edited(tiny_model("llama"), "1", "mlp_output")) == below
    inside = model_flops(edited(tiny_model("llama"), "1", "attention_output"))
    assert inside.layers_above == 2
    path = {"component": "model.layers[1].self_attn.output", "low_rank_dimension": 2}
    by_path = get_reft_model(tiny_model("llama"), ReftConfig({**path, "intervention": LoreftIntervention(16, 2)}))
    assert model_flops(by_path) == inside
    model = edited(tiny_model("llama"), "1")
    weight = model.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    trained = model_flops(model)
    assert trained.trained == weight.numel()
    assert trained.layers_above == 3
    encoder = model_flops(edited(tiny_model("bert"), "0"))
    assert not encoder.causal
    assert encoder.head == 0


def test_models_whose_operations_do_not_follow_from_their_weights_say_why() -> None:
    model = edited(tiny_model("llama"))
    model.model.config.num_local_experts = 4
    with pytest.raises(ValueError, match="mixtures of experts are not counted"):
        model_flops(model)
    model.model.config.num_local_experts = 1
    model.model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoders"):
        model_flops(model)
    model.model.config.is_encoder_decoder = False
    model.model.config.__dict__["num_attention_heads"] = [2, 4, 2]  # as some configs have it
    with pytest.raises(ValueError, match="different numbers of heads"):
        model_flops(model)
    for parameter in model.model.parameters():
        parameter.data = parameter.data.flatten()
    with pytest.raises(ValueError, match="spread over processes"):
        model_flops(model)


def test_peak_rates_by_name() -> None:
    assert rate_of("NVIDIA H100 80GB HBM3", torch.bfloat16, False).flops_per_second == 989e12
    assert rate_of("NVIDIA H100 PCIe", torch.float16, False).flops_per_second == 756e12
    assert rate_of("NVIDIA A100-SXM4-80GB", torch.float32, False).flops_per_second == 19.5e12
    assert rate_of("NVIDIA A100-SXM4-80GB", torch.float32, True).flops_per_second == 156e12
    assert rate_of("Tesla T4", torch.float32, True).flops_per_second == 8.1e12
    assert rate_of("NVIDIA L40S", torch.bfloat16, False).flops_per_second == 362e12
    assert rate_of("NVIDIA L4", torch.bfloat16, False).flops_per_second == 121e12
    assert rate_of("NVIDIA A10G", torch.bfloat16, False).flops_per_second == 70e12
    unknown = rate_of("Banana 9000", torch.bfloat16, False)
    assert unknown.flops_per_second is None
    assert "Banana 9000" in unknown.source
    assert rate_of("NVIDIA A40", torch.float64, False).flops_per_second is None
    assert peak_rate(torch.device("meta"), torch.float32).flops_per_second is None
    assert measure_matmul(torch.float32) > 1e6


def test_counts_of_padded_and_packed_batches_agree() -> None:
    lengths = [3, 5, 2]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    labels = torch.where(mask.bool(), 7, -100)
    labels[:, 0] = -100
    padded, packed = _Counts(), _Counts()
    padded.add({"input_ids": mask, "attention_mask": mask, "labels": labels}, True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]])
    packed_labels = torch.tensor([[-100, 7, 7, -100, 7, -100], [-100, 7, 7, 7, 7, -100]])
    packed.add({"input_ids": positions, "position_ids": positions, "labels": packed_labels}, True)
    whole = _Counts()
    whole.add({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, False)
    for counts in (padded, packed, whole):
        counts.gather(torch.device("cpu"))
    assert padded.values == packed.values == (10, 6 + 15 + 3, 7, 3)
    assert (padded.columns, packed.columns) == (15, 12)
    assert whole.values == (8, 32, 0, 2)


class Watch(TrainerCallback):
    """What a reporting callback gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trained(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A trainer that has done six steps of four rows."""
    reft_model = edited(make_llama())
    made = rows(24)
    data = make_supervised_data_module(
        make_tokenizer(), reft_model, [row["instruction"] for row in made], [row["output"] for row in made]
    )
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip
    trainer = ReftTrainerForCausalLM(
        reft_model, TrainingArguments(output_dir=str(folder), **arguments), callbacks=list(callbacks), **data
    )
    trainer.train()
    return trainer


def test_speed_is_in_every_training_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed, watch = Throughput(peak_flops=1e12), Watch()
    start = time.perf_counter()
    # The watching callback comes first: values are in the log before any callback sees it.
    trainer = trained(tmp_path, watch, speed)
    seconds = time.perf_counter() - start
    named = ("tokens_per_second", "padded_tokens_per_second", "examples_per_second", "step_ms", "mfu")
    training = [log for log in watch.logs if "loss" in log]
    assert len(training) == 3
    for log in training:
        assert all(log[name] > 0 for name in (*named, "peak_memory_gib"))
        assert log["tokens_per_second"] < log["padded_tokens_per_second"]
        assert log["examples_per_second"] == pytest.approx(4000 / log["step_ms"])
    assert next(entry for entry in trainer.state.log_history if "loss" in entry)["mfu"] == training[0]["mfu"]
    assert not any("mfu" in log for log in watch.logs if "loss" not in log)
    totals = speed.totals()
    used = 6 * totals["step_ms"] / 1000
    assert 0 < used < seconds
    assert totals["tokens_per_second"] * used == pytest.approx(sum(trainer.train_dataset.lengths))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("speed")]
    assert said == [speed.summary()]
    assert " tokens/s, " in said[0]
    assert "% of 1 TFLOP/s (the given peak)" in said[0]


def test_time_for_evaluation_is_no_step_time(tmp_path: Path) -> None:
    class Slow(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            time.sleep(0.5)

    speed = Throughput(show=False)
    trained(tmp_path, Slow(), speed, save_strategy="steps", save_steps=1, logging_steps=3)
    assert 6 * speed.totals()["step_ms"] < 1500


def test_what_is_left_out_says_so(tmp_path: Path) -> None:
    class Experts(LogValues):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            model.model.config.num_experts = 8

    speed = Throughput(show=False)
    trainer = trained(tmp_path, Experts(), speed)
    assert not any("mfu" in entry for entry in trainer.state.log_history)
    assert speed.without_mfu == "mixtures of experts are not counted"
    assert "no MFU (mixtures of experts are not counted)" in speed.summary()
    with pytest.raises(ValueError, match="peak_flops must be positive"):
        Throughput(peak_flops=0)


def test_tensorboard_gets_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, Throughput(show=False), report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(file)).Reload()
    assert {"train/tokens_per_second", "train/loss"} <= set(board.Tags()["scalars"])


def test_the_log_is_plain_json(tmp_path: Path) -> None:
    trainer = trained(tmp_path, Throughput(show=False))
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history
