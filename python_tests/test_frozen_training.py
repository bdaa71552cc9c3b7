"""The Trainer with a FrozenCache: the same curve of losses and the same adapter as without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_training_trainer import arguments, make_data, state
from torch import Tensor
from training_support import make_llama, make_tokenizer, rows, save_model, write_rows
from transformers import set_seed
from two_processes import WORLD, in_processes

import reft_kernels as pyreft
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model
from reft_kernels.training import FrozenCache, ReftTrainerForCausalLM

EXAMPLES, EPOCHS = 12, 6


class Recorded(ReftTrainerForCausalLM):
    """Keeps every step's loss, which the log may round, and the shape of its logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if isinstance(found, tuple) else found
        self.seen: list[float] = [*getattr(self, "seen", []), float(loss.detach())]
        return found


def make_model(dtype: torch.dtype = torch.float32, **options: Any) -> ReftModel:
    set_seed(1)
    config: dict[str, Any] = {"method": "loreft", "layers": "all", "rank": 2, "positions": "l2", **options}
    model = get_reft_model(make_llama().to(dtype), ReftConfig(**config))
    model.interventions.to(dtype)
    return model


def make_trainer(
    folder: Path, cache: dict[str, Any] | None, dtype: torch.dtype = torch.float32, model: Any = None, **options: Any
) -> Recorded:
    model = make_model(dtype) if model is None else model
    given = {name: options.pop(name) for name in ("compute_loss_func", "data") if name in options}
    data = given.pop("data", None) or make_data(model, EXAMPLES)
    frozen = None if cache is None else FrozenCache(model, **cache)
    args = arguments(folder, num_train_epochs=EPOCHS, **options)
    return Recorded(model, args, frozen_cache=frozen, **given, **data)


def in_double(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """transformers' own loss is in float32."""
    logits, wanted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch


def assert_same_curve(found: Recorded, wanted: Recorded, rel: float) -> None:
    assert len(found.seen) == len(wanted.seen) >= EPOCHS
    assert found.seen == pytest.approx(wanted.seen, rel=rel)
    assert sum(wanted.seen[-EPOCHS:]) < 0.97 * sum(wanted.seen[:EPOCHS])
    start = state(make_model(next(found.model.interventions.parameters()).dtype))
    for name, value in state(wanted.model).items():
        moved = (value - start[name]).abs().max() if name in start else value.abs().max()
        assert (state(found.model)[name] - value).abs().max() <= 10 * rel * moved + 10 * rel, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.2},
        {"dataloader_num_workers": 1, "dataloader_drop_last": True, "per_device_train_batch_size": 5},
        {"remove_unused_columns": False, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_curves_in_float32(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = make_trainer(tmp_path, None, **options)
    plain.train()
    cached = make_trainer(tmp_path, {}, **options)
    cached.train()
    assert_same_curve(cached, plain, 1e-5)
    stats = cached.frozen_cache.stats
    assert stats.misses == EXAMPLES
    assert stats.hits == len(cached.seen) * cached.args.per_device_train_batch_size - stats.misses > 3 * EXAMPLES
    assert stats.saved_fraction > 0.6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_curves_in_float64(tmp_path: Path, accumulation: int) -> None:
    options = {"compute_loss_func": in_double, "gradient_accumulation_steps": accumulation}
    plain = make_trainer(tmp_path, None, torch.float64, **options)
    plain.train()
    cached = make_trainer(tmp_path, {}, torch.float64, **options)
    cached.train()
    assert_same_curve(cached, plain, 1e-10)


@pytest.mark.parametrize(
    "config",
    [
        {"layers": [1], "positions": "f2+l2", "tied": False},
        {"layers": "all", "positions": "f2+l2"},
        {"layers": [0], "component": "mlp_output", "method": "direft"},
        {"layers": "all", "positions": "l2", "orthogonality": "polar"},
    ],
    ids=str,
)
def test_curves_of_other_configs(tmp_path: Path, config: dict[str, Any]) -> None:
    trainers = [make_trainer(tmp_path, cache, model=make_model(**config)) for cache in (None, {})]
    for trainer in trainers:
        trainer.train()
    plain, cached = trainers
    assert cached.seen == pytest.approx(plain.seen, rel=1e-5)
    assert sum(plain.seen[-EPOCHS:]) < sum(plain.seen[:EPOCHS])


def test_pyrefts_data_modules(tmp_path: Path) -> None:
    made = rows(EXAMPLES)
    prompts, outputs = [f"{row['instruction']}\n" for row in made], [row["output"] for row in made]
    trainers = []
    for cache in (None, {}):
        model = make_model(positions="l1")
        data = pyreft.make_last_position_supervised_data_module(
            make_tokenizer(pad=True), model, prompts, outputs, num_interventions=2
        )
        trainers.append(make_trainer(tmp_path, cache, model=model, data=data))
        trainers[-1].train()
    plain, cached = trainers
    assert_same_curve(cached, plain, 1e-5)
    assert cached.frozen_cache.stats.misses == EXAMPLES


def test_logits_are_of_the_columns_that_predict_a_target(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, {})
    shapes = []
    handle = trainer.model.model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape[1]))
    trainer.train()
    handle.remove()
    data = make_data(trainer.model, EXAMPLES)["train_dataset"]
    longest = max(int((row["labels"] != -100).sum()) for row in (data[k] for k in range(EXAMPLES)))
    assert max(shapes) <= longest + 1 < min(len(data[k]["input_ids"]) for k in range(EXAMPLES))


def test_within_a_budget_and_with_files_of_another_run(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, None)
    plain.train()
    disk: dict[str, Any] = {"place": "disk", "folder": tmp_path / "states"}
    for cache in ({"budget": 30_000}, {"place": "disk", "folder": tmp_path / "few", "budget": 30_000}):
        cached = make_trainer(tmp_path, cache)
        with pytest.warns(UserWarning, match="budget of 30,000 bytes is used up"):
            cached.train()
        assert_same_curve(cached, plain, 1e-5)
        assert 0 < cached.frozen_cache.stats.hits < cached.frozen_cache.stats.misses + EPOCHS * EXAMPLES
        assert cached.frozen_cache.stats.bytes <= 30_000
    first = make_trainer(tmp_path, disk)
    first.train()
    second = make_trainer(tmp_path, disk)
    second.train()
    assert second.seen == first.seen
    assert second.frozen_cache.stats.misses == 0
    assert_same_curve(second, plain, 1e-5)


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    plain, cached = make_trainer(tmp_path, None), make_trainer(tmp_path, {})
    data = make_data(cached.model, EXAMPLES)["train_dataset"]
    losses = [trainer.evaluate(data)["eval_loss"] for trainer in (plain, cached, cached)]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    assert cached.frozen_cache.stats.hits == EXAMPLES
    whole, cut = plain.predict(data), cached.predict(data)
    for row in range(EXAMPLES):
        wanted = whole.predictions[row][:-1][whole.label_ids[row][1:] != -100]
        found = cut.predictions[row][:-1][cut.label_ids[row][1:] != -100]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_mixed_precision(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, None, bf16=True)
    plain.train()
    cached = make_trainer(tmp_path, {}, bf16=True)
    cached.train()
    entry = next(iter(cached.frozen_cache._store._entries.values()))
    assert entry.values.dtype == torch.bfloat16
    assert cached.seen == pytest.approx(plain.seen, rel=0.05)


def test_resuming(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 20}
    whole = make_trainer(tmp_path / "whole", {}, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", {}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    assert resumed.seen == pytest.approx(whole.seen[20:], rel=1e-5)
    assert resumed.frozen_cache.stats.misses == EXAMPLES


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    data = make_data(model)
    with pytest.raises(ValueError, match="must be made for the model that is trained"):
        ReftTrainerForCausalLM(model, arguments(tmp_path), frozen_cache=FrozenCache(other), **data)
    with pytest.raises(TypeError, match="frozen_cache must be a FrozenCache, got str"):
        ReftTrainerForCausalLM(model, arguments(tmp_path), frozen_cache="memory", **data)
    for name, value in (("gradient_checkpointing", True), ("torch_compile", True), ("neftune_noise_alpha", 5.0)):
        options = arguments(tmp_path)
        setattr(options, name, value)  # made with torch_compile, they would set the environment for every later Trainer
        with pytest.raises(ValueError, match=f"does not work together with {name}"):
            ReftTrainerForCausalLM(model, options, frozen_cache=FrozenCache(model), **data)
    every = make_model(positions=None)
    trainer = make_trainer(tmp_path, {}, model=every)
    with pytest.raises(ValueError, match="needs intervention_locations"):
        trainer.train()


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    from benchmarks import frozen_cache

    model, data = save_model(tmp_path / "tiny"), write_rows(tmp_path / "rows.jsonl", rows(8))
    out = tmp_path / "out" / "found.json"
    options = ["--model", str(model), "--data", str(data), "--out", str(out), "--epochs", "3", "--positions", "l2"]
    assert frozen_cache.main([*options, "--place", "disk", "--threads", "1", "--batch", "3"]) == 0
    report = json.loads(out.read_text())
    assert [len(report["sides"][name]["losses"]) for name in ("uncached", "cached")] == [9, 9]
    assert report["largest_relative_difference_of_losses"] < 1e-5
    assert (report["cache"]["misses"], report["cache"]["hits"]) == (8, 16)
    peaks = [report["sides"][name]["peak_mib_of_a_step"] for name in ("uncached", "cached")]
    assert 0 < peaks[1] < 0.7 * peaks[0]
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "epoch 3 of 3" in capsys.readouterr().err


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    caches: dict[str, Any] = {"none": None, "memory": {}, "disk": {"place": "disk", "folder": f"{folder}/states"}}
    found = {}
    for place, cache in caches.items():
        trainer = make_trainer(Path(folder), cache)
        trainer.train()
        found[place] = {"seen": trainer.seen, "state": state(trainer.model)}
        if trainer.frozen_cache is not None:
            found[place] |= {"misses": trainer.frozen_cache.stats.misses, "hits": trainer.frozen_cache.stats.hits}
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes(tmp_path: Path) -> None:
    in_processes(work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for found in ranks:
        plain = found["none"]
        for place in ("memory", "disk"):
            assert found[place]["seen"] == pytest.approx(plain["seen"], rel=1e-5)
            for name, value in plain["state"].items():
                torch.testing.assert_close(found[place]["state"][name], value, rtol=1e-3, atol=1e-5)
            assert found[place]["misses"] + found[place]["hits"] == EPOCHS * EXAMPLES // WORLD
    for name, value in ranks[0]["memory"]["state"].items():
        assert torch.equal(value, ranks[1]["memory"]["state"][name]), name
    # A process of its own memory meets every row sooner or later, those with one folder compute each row once.
    assert sum(found["memory"]["misses"] for found in ranks) > EXAMPLES
    assert sum(found["disk"]["misses"] for found in ranks) == EXAMPLES
    assert len(list(tmp_path.rglob("*.safetensors"))) == EXAMPLES
    assert ranks[0]["none"]["seen"] != ranks[1]["none"]["seen"]
