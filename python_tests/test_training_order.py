"""In which order examples are seen: grouped by length, or streamed; also after resuming."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from training_support import make_llama, make_tokenizer, rows, write_rows
from transformers import TrainerCallback, TrainingArguments

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import ReftTrainerForCausalLM, SupervisedCollator, SupervisedDataset
from reft_kernels.training.length_groups import LengthGroups, length_grouping
from reft_kernels.training.log_values import LogValues
from reft_kernels.training.sources import SkippedRows
from reft_kernels.training.streaming import StreamedDataset, shuffled


def edited(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return get_reft_model(make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2"))


class Seen(LogValues):
    """The token ids of every batch of training."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def see_batch(self, inputs: Any) -> None:
        self.batches.append(inputs["input_ids"].tolist())


class Stop(TrainerCallback):
    """Stops after a step, with a checkpoint, as when a run is killed and goes on later."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(folder: Path, dataset: Any, *callbacks: Any, resume: bool = False, **options: Any) -> Any:
    arguments = {
        "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "seed": 3,
        "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01, **options,
    }  # fmt: skip
    trainer = ReftTrainerForCausalLM(
        edited(), TrainingArguments(str(folder), **arguments), data_collator=SupervisedCollator(),
        train_dataset=dataset, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def supervised(count: int) -> Any:
    made = rows(count)
    return SupervisedDataset(
        make_tokenizer(), edited(), [row["instruction"] for row in made], [row["output"] for row in made]
    )


def test_batches_of_one_length_have_little_padding_and_every_example() -> None:
    lengths = torch.randint(5, 200, (1000,)).tolist()
    groups = LengthGroups(lengths, 8, seed=1)
    order = list(groups)
    assert sorted(order) == list(range(1000))
    assert list(groups) == order

    def columns(order: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in order[start : start + 8]) for start in range(0, 1000, 8))

    assert columns(order) < 1.15 * sum(lengths)
    assert columns(list(range(1000))) > 1.5 * sum(lengths)
    groups.set_epoch(1)
    assert list(groups) != order
    assert list(LengthGroups(lengths, 8, seed=2)) != order


def test_the_trainer_groups_by_known_lengths_without_tokenising_again(tmp_path: Path) -> None:
    class Counting(SupervisedDataset):
        read = 0

        def __getitem__(self, index: int) -> Any:
            type(self).read += 1
            return super().__getitem__(index)

    dataset = supervised(48)
    dataset.__class__ = Counting
    seen, plain = Seen(), Seen()
    train(tmp_path, dataset, seen, num_train_epochs=1, **length_grouping())
    assert Counting.read == 48
    train(tmp_path, dataset, plain, num_train_epochs=1)

    def columns(batches: Any) -> int:
        return sum(len(batch) * len(batch[0]) for batch in batches)

    assert columns(seen.batches) < columns(plain.batches)


def test_a_resumed_run_sees_the_groups_that_it_would_have_seen(tmp_path: Path) -> None:
    dataset = supervised(48)
    whole, first, second = Seen(), Seen(), Seen()
    trainer = train(tmp_path / "whole", dataset, whole, num_train_epochs=3, **length_grouping())
    train(tmp_path / "cut", dataset, first, Stop(17), num_train_epochs=3, **length_grouping())
    resumed = train(tmp_path / "cut", dataset, second, resume=True, num_train_epochs=3, **length_grouping())
    assert first.batches == whole.batches[:17]
    assert second.batches == whole.batches[17:]
    assert whole.batches[:12] != whole.batches[12:24]
    for one, other in zip(
        trainer.model.interventions.parameters(), resumed.model.interventions.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def stream(path: Path, **options: Any) -> StreamedDataset:
    return StreamedDataset(make_tokenizer(), edited(), path, **options)


def ids(items: Any) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in items]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl.gz", rows(150))


def test_a_stream_has_the_items_of_the_data_set(path: Path) -> None:
    made = rows(150)
    held = SupervisedDataset(
        make_tokenizer(), edited(), [row["instruction"] + "\n" for row in made], [row["output"] for row in made]
    )
    for one, other in zip(held, stream(path, repeat=False), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_is_shuffled_by_seed_epoch_and_pass(path: Path) -> None:
    plain = ids(stream(path, repeat=False))
    one, same, other = (ids(stream(path, repeat=False, shuffle=40, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert one != plain
    assert sorted(one) == sorted(other) == sorted(plain)
    endless = iter(stream(path, shuffle=40, seed=1))
    passes = [[next(endless)["input_ids"].tolist() for _ in range(150)] for _ in range(2)]
    assert passes[0] == one
    assert passes[1] != one
    assert sorted(passes[1]) == sorted(one)
    later = stream(path, repeat=False, shuffle=40, seed=1)
    later.set_epoch(1)
    assert ids(later) not in (one, passes[1])
    assert list(shuffled(iter(range(5)), 1, "a")) == list(range(5))


def test_workers_and_processes_share_the_rows(path: Path) -> None:
    plain = Counter(map(tuple, ids(stream(path, repeat=False))))
    for options in ({}, {"shuffle": 16}):
        loader = DataLoader(stream(path, repeat=False, **options), batch_size=None, num_workers=3)
        assert Counter(map(tuple, ids(loader))) == plain
        parts = [ids(stream(path, repeat=False, shard=(number, 4), **options)) for number in range(4)]
        assert Counter(tuple(item) for part in parts for item in part) == plain
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_resumed_stream_goes_on_where_it_was(path: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        whole, first, second = Seen(), Seen(), Seen()
        options = {"max_steps": 50, "dataloader_num_workers": workers}  # 200 of 150 rows: into the second pass
        trainer = train(tmp_path / f"whole{workers}", stream(path, shuffle=32), whole, **options)
        assert len(whole.batches) == 50
        train(tmp_path / f"cut{workers}", stream(path, shuffle=32), first, Stop(41), **options)
        resumed = train(tmp_path / f"cut{workers}", stream(path, shuffle=32), second, resume=True, **options)
        assert first.batches == whole.batches[:41]
        assert second.batches == whole.batches[41:]
        for one, other in zip(
            trainer.model.interventions.parameters(), resumed.model.interventions.parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_streams_with_something_wrong(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([json.dumps(rows(1)[0]), "3", json.dumps(rows(2)[1])]), encoding="utf-8")
    items = iter(stream(broken))
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2: expected a JSON object"):
        next(items)
    skipped = SkippedRows()
    assert len(ids(stream(broken, repeat=False, skipped=skipped))) == 2
    assert skipped.count == 1
    with pytest.raises(ValueError, match="holds no example that can be used"):
        next(iter(stream(path, max_length=2)))
    for options, message in (
        ({"shuffle": -1}, "shuffle must be"), ({"shard": (2, 2)}, "shard must be"), ({"max_length": 1}, "max_length"),
        ({"template": "no place"}, "exactly once"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            stream(path, **options)


def test_own_texts_and_fields(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "red box", "a": "red"}])
    by_fields = ids(stream(path, repeat=False, fields={"q": "instruction", "a": "output"}, template="Q: %s"))
    by_texts = ids(stream(path, repeat=False, texts=lambda row: (f"Q: {row.fields['q']}", row.fields["a"])))
    assert by_fields == by_texts
