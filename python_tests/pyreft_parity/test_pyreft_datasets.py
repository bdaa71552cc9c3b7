"""pyreft's data sets and functions: ours are the same to the bit with `pyreft_compat`, and else but for its faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_peer import CLASSES, EARLY, SHORT, both, items, plain, rows, tokenizer, unsunk
from pyreft import dataset as stock
from transformers import AutoTokenizer

from reft_kernels.training import data_modules, pyreft_datasets, task_datasets


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("share_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("position", ["f2+l3", "f7+l7", "f3", "l1", "f40+l30"])
@pytest.mark.parametrize("name", CLASSES)
def test_compat_is_equal_to_the_bit(name: str, position: str, share_weights: bool, split: str) -> None:
    theirs, compat, _ = both(name, position=position, share_weights=share_weights, data_split=split)
    assert items(compat) == items(theirs)
    assert len(compat) == len(theirs) == 8
    assert (compat.raw_dataset is None) == (theirs.raw_dataset is None)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", CLASSES)
def test_default_differs_by_the_sink_and_the_early_suffix_alone(name: str, split: str) -> None:
    given = [one for one in rows() if one["instruction"] != SHORT]
    theirs, _, ours = both(name, given, data_split=split)
    assert items(ours) == [unsunk(item, name in EARLY) for item in items(theirs)]


@pytest.mark.parametrize("name", CLASSES)
def test_a_short_prompt_has_slots_without_a_token(name: str) -> None:
    """pyreft's -1 + 1 is the sink; ours stays -1."""
    _, compat, ours = both(name, position="f400+l300")
    for old, new in zip(items(compat), items(ours), strict=True):
        assert all(0 in line for line in old["intervention_locations"])
        assert all(-1 in line for line in new["intervention_locations"])
        length = min(len(new[field][1]) for field in ("input_ids", "chosen_output", "rejected_output") if field in new)
        assert max(p for line in new["intervention_locations"] for p in line) < length


# Choosing and loading rows


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "Dataset"])
@pytest.mark.parametrize("name", ["raw", "supervised"])
def test_max_n_example_chooses_the_same_rows(name: str, as_list: bool) -> None:
    """Of a list as well, which pyreft cannot shuffle."""
    table = datasets.Dataset.from_list(rows(30))
    theirs, ours, fields = CLASSES[name]
    settings = {"position": "l1", "num_interventions": 1, "max_n_example": 7, "seed": 5, **fields}
    wanted = theirs("task", None, tokenizer(), dataset=table, **settings)
    given = rows(30) if as_list else table
    found = ours("task", None, tokenizer(), dataset=given, pyreft_compat=True, **settings)
    assert items(found) == items(wanted)
    if as_list:
        with pytest.raises(AttributeError, match="shuffle"):
            theirs("task", None, tokenizer(), dataset=given, **settings)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["raw", "supervised"])
def test_rows_of_a_json_file(name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows(9)), encoding="utf-8")
    theirs, ours, fields = CLASSES[name]
    settings = {"position": "l1", "num_interventions": 1, "data_split": split, "max_n_example": 5, **fields}
    found = ours("task", str(path), tokenizer(), pyreft_compat=True, **settings)
    assert len(found) == 5
    if (name, split) == ("raw", "test"):
        with pytest.raises(KeyError):
            theirs("task", str(path), tokenizer(), **settings)
        return
    wanted = theirs("task", str(path), tokenizer(), **settings)
    assert items(found) == items(wanted)
    assert (found.raw_dataset is None) == (wanted.raw_dataset is None)
    if split == "test":
        assert list(found.raw_dataset) == list(wanted.raw_dataset)


def test_columns_of_the_raw_data_set() -> None:
    theirs, compat, _ = both("raw", rows(subspaces=[0, 2]))
    for name in ("input_ids", "attention_mask", "intervention_locations", "labels", "subspaces", "id"):
        assert plain(getattr(compat, name)) == plain(getattr(theirs, name)), name
    theirs, compat, _ = both("raw", data_split="test")
    assert compat.labels is theirs.labels is None
    assert compat.subspaces is theirs.subspaces is None


def test_no_stop_and_the_prompts() -> None:
    for no_stop in (True, False):
        theirs, compat, _ = both("supervised", no_stop=no_stop)
        assert items(compat) == items(theirs)
    assert stock.prompt_input == task_datasets.WITH_INPUT
    assert stock.prompt_no_input == task_datasets.WITHOUT_INPUT


def observe(base: Any) -> tuple[list[Any], Any]:
    """The calls that a subclass overriding every method sees, and one of its items."""
    calls: list[Any] = []

    class Own(base):  # type: ignore[misc]
        def preprocess(self, kwargs: dict[str, Any]) -> None:
            calls.append(("preprocess", sorted(kwargs)))
            kwargs["seen"] = True

        def load_dataset(self) -> Any:
            calls.append(("load_dataset", self.task, self.data_path, self.data_split, self.seed, self.max_n_example))
            return [{"text": "red box"}, {"text": "blue box"}]

        def postprocess(self, kwargs: dict[str, Any]) -> None:
            calls.append(("postprocess", sorted(kwargs), len(self.task_dataset)))

        def tokenize(self, data_item: Any) -> Any:
            calls.append(("tokenize", data_item))
            ids = self.tokenizer(data_item["text"], return_tensors="pt")["input_ids"][0]
            return {"input_ids": ids, "labels": ids.clone(), "word": data_item["text"]}, len(ids)

        def compute_intervention_and_subspaces(self, id: int, data_item: Any, result: Any, last: int, **kw: Any) -> Any:
            calls.append(("compute", id, data_item, sorted(result), last, sorted(kw)))
            return super().compute_intervention_and_subspaces(id, data_item, result, last, **kw)

        def get_intervention_locations(self, **kwargs: Any) -> Any:
            calls.append(("locations", kwargs))
            return [[0, kwargs["last_position"] - 1]] * kwargs["num_interventions"]

    options = {"position": "f1+l1", "num_interventions": 2, "mine": 3, "data_split": "dev", "max_n_example": 2}
    data = Own("task", "path", tokenizer(), **options)
    data[0]["input_ids"].zero_()  # items are copies
    return calls, plain(data[0])


def test_hooks_are_called_as_subclasses_expect() -> None:
    theirs, item = observe(stock.ReftDataset)
    ours, found = observe(pyreft_datasets.ReftDataset)
    assert ours == theirs
    assert len({call[0] for call in ours}) == 6
    assert found == unsunk(item, False)
    assert found["word"] == "red box"
    assert any(found["input_ids"][1])


# The functions

PROMPTS = [SHORT, "re", "which colour is the red box ?", "the box", "which colour is the blue box please ?"]
OUTPUTS = ["red", " blue", "the correct answer is red", "", "blue"]
FUNCTIONS = {
    "make_last_position_supervised_data_module": [{}],
    "make_last_position_supervised_chat_data_module": [{}],
    "make_multiple_position_supervised_data_module": [
        {"positions": written, "share_weights": tied} for written in ("f1+l1", "f3+l2", "l4") for tied in (True, False)
    ],
}


@pytest.mark.parametrize("nonstop", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_data_modules(name: str, nonstop: bool) -> None:
    for options in FUNCTIONS[name]:
        arguments = (tokenizer(), None, PROMPTS, OUTPUTS)
        settings = {"num_interventions": 4, "nonstop": nonstop, **options}
        theirs = getattr(stock, name)(*arguments, **settings)
        compat = getattr(data_modules, name)(*arguments, **settings, pyreft_compat=True)
        ours = getattr(data_modules, name)(*arguments, **settings)
        assert set(compat) == set(ours) == set(theirs)
        assert compat["eval_dataset"] is ours["eval_dataset"] is theirs["eval_dataset"] is None
        wanted, found = theirs["train_dataset"], compat["train_dataset"]
        assert found.features == wanted.features
        assert found.column_names == wanted.column_names
        assert ours["train_dataset"].features == wanted.features
        assert list(found) == list(wanted)
        batch = [theirs["train_dataset"][index] for index in (0, 2, 4)]
        assert plain(dict(compat["data_collator"](batch))) == plain(dict(theirs["data_collator"](batch)))
        mended = [
            {**item, "intervention_locations": [[-1 if p == length else p for p in line] for line in lines]}
            for item, lines, length in (
                (item, item["intervention_locations"], item["labels"].count(-100)) for item in wanted
            )
        ]
        assert list(ours["train_dataset"]) == mended


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raw", "supervised", "generation", "preference", "reward"])
def test_with_a_tokenizer_in_use(name: str, smollm2: Path) -> None:
    """SmolLM2's, whose padding token is its end token and whose chats begin every message with the start token."""
    made = AutoTokenizer.from_pretrained(smollm2)
    made.model_max_length = 64
    theirs, compat, ours = both(name, tokenize=made, position="f7+l7")
    assert items(compat) == items(theirs)
    for item in items(ours):
        field = "chosen_output" if name == "reward" else "input_ids"
        assert max(p for line in item["intervention_locations"] for p in line) < len(item[field][1])
