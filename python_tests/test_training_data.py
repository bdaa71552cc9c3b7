"""Rows, prompts, token ids, labels, edit positions and the collator."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_support import make_tokenizer, rows, write_rows

from reft_kernels.positions import prompt_mask, prompt_positions
from reft_kernels.training.data import (
    Example,
    SupervisedCollator,
    SupervisedDataset,
    build_prompt,
    encode_prompts,
    make_supervised_data_module,
    pad_token_id,
    parse_row,
    read_jsonl,
)


def edits(*positions: str | None) -> Any:
    """Stands in for a ReftModel, of which the data set looks at the representations' positions alone."""
    return SimpleNamespace(representations=[SimpleNamespace(positions=text) for text in positions])


def texts(count: int = 12) -> tuple[list[str], list[str]]:
    made = rows(count)
    return [build_prompt(row["instruction"]) for row in made], [row["output"] for row in made]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_read_jsonl_gives_every_row_in_order(tmp_path: Path, suffix: str) -> None:
    made = rows(7)
    path = write_rows(tmp_path / f"rows{suffix}", made)
    assert read_jsonl(path) == [Example(**row) for row in made]
    assert read_jsonl(path, max_examples=3) == [Example(**row) for row in made[:3]]


def test_read_jsonl_skips_blank_lines_and_takes_numbers_as_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"instruction": "2+2", "output": "four", "answer": 4}\n  \n', encoding="utf-8")
    assert read_jsonl(path) == [Example("2+2", "", "four", "4")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "a", "answer": "b"}', "line 2: field 'output' is missing .*'instruction', 'answer'"),
        (b'{"output": "a"}', "line 2: field 'instruction' is missing"),
        (b'{"instruction": "", "output": "a"}', "line 2: field 'instruction' is empty"),
        (b'{"instruction": 3, "output": "a"}', "line 2: field 'instruction' must be text, got int"),
        (b'{"instruction": "a", "output": ["b"]}', "line 2: field 'output' must be text, got list"),
        (b'{"instruction": "a", "output": "b", "answer": true}', "line 2: field 'answer' must be text, got bool"),
        (b'{"instruction": "a"', "line 2: not valid JSON, .*column"),
        (b'["a", "b"]', "line 2: expected a JSON object .* got list"),
        (b'{"instruction": "\xff", "output": "b"}', "line 2: not UTF-8 text"),
    ],
)
def test_read_jsonl_names_file_line_and_field(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"^{path}, {message}"):
        read_jsonl(path)


def test_read_jsonl_without_output_needs_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "answer": "b"}\n', encoding="utf-8")
    assert read_jsonl(path, needs_output=False) == [Example("a", "", None, "b")]
    with pytest.raises(ValueError, match="fields 'answer' and 'output' are both missing"):
        parse_row({"instruction": "a"}, "here", needs_output=False)


def test_read_jsonl_of_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*nowhere"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty.jsonl holds no rows"):
        read_jsonl(empty)
    whole = write_rows(tmp_path / "whole.jsonl.gz", rows(500)).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: damaged gzip data after line \d+"):
        read_jsonl(cut)
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(rows(1)[0]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plain.jsonl.gz: damaged gzip data"):
        read_jsonl(plain)


def test_build_prompt() -> None:
    assert build_prompt("say 100%") == "say 100%\n"
    assert build_prompt("sum up", "a text") == "sum up\n\na text\n"
    assert build_prompt("50% of %d", template="Q: %s\nA (in %):") == "Q: 50% of %d\nA (in %):"
    for template in ("no place", "%s and %s"):
        with pytest.raises(ValueError, match="exactly once"):
            build_prompt("a", template=template)


def test_items_mask_the_prompt_and_end_with_the_end_token() -> None:
    tokenizer = make_tokenizer(bos=True)
    prompts, outputs = texts()
    dataset = SupervisedDataset(tokenizer, edits("f2+l3"), prompts, outputs)
    assert len(dataset) == len(prompts)
    for prompt, output, item, length in zip(prompts, outputs, dataset, dataset.lengths, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        full_ids = [*tokenizer(prompt + output)["input_ids"], tokenizer.eos_token_id]
        assert item["input_ids"].tolist() == full_ids
        assert item["labels"].tolist() == [-100] * len(prompt_ids) + full_ids[len(prompt_ids) :]
        assert length == len(full_ids)
    without = SupervisedDataset(tokenizer, edits("f2+l3"), prompts, outputs, append_eos=False)
    assert without[3]["input_ids"].tolist() == dataset[3]["input_ids"].tolist()[:-1]
    assert dataset[-1]["input_ids"].equal(dataset[len(dataset) - 1]["input_ids"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_tokenizer_that_appends_the_end_token_changes_nothing() -> None:
    prompts, outputs = texts(4)
    plain = SupervisedDataset(make_tokenizer(bos=True), edits("f1+l1"), prompts, outputs)
    appending = SupervisedDataset(make_tokenizer(bos=True, append_eos=True), edits("f1+l1"), prompts, outputs)
    for a, b in zip(plain, appending, strict=True):
        assert {name: value.tolist() for name, value in a.items()} == {
            name: value.tolist() for name, value in b.items()
        }
    assert encode_prompts(make_tokenizer(append_eos=True), ["red</s>"])[0][-1] == 1


@pytest.mark.parametrize("positions", ["f2+l3", "f4", "l1", "f40+l30"])
def test_locations_agree_with_those_found_on_the_device(positions: str) -> None:
    tokenizer = make_tokenizer()
    prompts, outputs = texts()
    dataset = SupervisedDataset(tokenizer, edits(positions, positions), prompts, outputs)
    batch = SupervisedCollator()([dataset[index] for index in range(len(dataset))])
    assert batch["intervention_locations"].dtype == torch.int64
    assert batch["intervention_locations"].shape[:2] == (len(dataset), 2)
    first, last = {"f2+l3": (2, 3), "f4": (4, 0), "l1": (0, 1), "f40+l30": (40, 30)}[positions]
    expected = prompt_positions(prompt_mask(batch["attention_mask"], batch["labels"]), first, last)
    for row, same in zip(batch["intervention_locations"], expected, strict=True):
        wanted = sorted(p for p in same.tolist() if p >= 0)
        for representation in row:
            assert sorted(p for p in representation.tolist() if p >= 0) == wanted
            assert len(representation) == first + last


def test_untied_representations_each_have_their_own_locations() -> None:
    dataset = SupervisedDataset(make_tokenizer(), edits("f2", "f2", "l3", "l3"), *texts(2))
    item = dataset[0]
    prompt = int((item["labels"] == -100).sum())
    assert item["intervention_locations"].tolist() == [
        [0, 1, -1],
        [0, 1, -1],
        [prompt - 3, prompt - 2, prompt - 1],
        [prompt - 3, prompt - 2, prompt - 1],
    ]


def test_short_prompts_split_their_tokens_between_both_ends() -> None:
    tokenizer = make_tokenizer()
    prompts = [text for text in ("r", "re?", "a b c") if tokenizer(text)["input_ids"]]
    dataset = SupervisedDataset(tokenizer, edits("f7+l7"), prompts, ["x"] * len(prompts))
    for item, prompt in zip(dataset, prompts, strict=True):
        n = len(tokenizer(prompt)["input_ids"])
        named = [p for p in item["intervention_locations"][0].tolist() if p >= 0]
        assert named == [*range(n // 2), *range(n - n // 2, n)]
        assert item["intervention_locations"].shape == (1, 14)


@pytest.mark.parametrize("positions", [("all",), (None,), ("f1", "all")])
def test_no_locations_where_all_tokens_are_edited(positions: tuple[str | None, ...]) -> None:
    dataset = SupervisedDataset(make_tokenizer(), edits(*positions), *texts(3))
    batch = SupervisedCollator()([dataset[0], dataset[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_max_length_cuts_outputs_and_leaves_out_what_has_none() -> None:
    tokenizer = make_tokenizer()
    prompts, outputs = texts(10)
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
    limit = sorted(lengths)[5]
    with pytest.warns(UserWarning, match=r"examples left out: .*max_length"):
        dataset = SupervisedDataset(tokenizer, edits("l1"), prompts, outputs, max_length=limit)
    assert dataset.dropped == [index for index, length in enumerate(lengths) if length >= limit]
    assert 0 < len(dataset) == len(prompts) - len(dataset.dropped)
    for item in dataset:
        assert len(item["input_ids"]) <= limit
        assert (item["labels"] != -100).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SupervisedDataset(tokenizer, edits("l1"), prompts, outputs).dropped == []


def test_dataset_rejects_what_cannot_be_trained_on() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="2 prompts, 1 outputs"):
        SupervisedDataset(tokenizer, edits("l1"), ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="prompt 1 has no tokens: ''"):
        SupervisedDataset(tokenizer, edits("l1"), ["a", ""], ["c", "d"])
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        SupervisedDataset(tokenizer, edits("l1"), ["a"], ["c"], max_length=1)
    with pytest.raises(ValueError, match="none of the 1 examples"):
        SupervisedDataset(tokenizer, edits("l1"), ["which colour is the red box ?"], ["c"], max_length=2)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        SupervisedDataset(tokenizer, edits("l1"), ["a"], ["c"])


def test_collator_pads_on_the_right_and_masks_by_length() -> None:
    eos = 1
    items = [
        {
            "input_ids": torch.tensor([5, eos, 6, eos]),
            "labels": torch.tensor([-100, -100, 6, eos]),
            "intervention_locations": torch.tensor([[0, 1]]),
        },
        {
            "input_ids": torch.tensor([7, eos]),
            "labels": torch.tensor([-100, eos]),
            "intervention_locations": torch.tensor([[0]]),
        },
    ]
    batch = SupervisedCollator(pad_token_id=eos)(items)
    assert batch["input_ids"].tolist() == [[5, 1, 6, 1], [7, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 1], [-100, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["intervention_locations"].tolist() == [[[0, 1]], [[0, -1]]]


def test_pad_token_id_falls_back_to_the_end_token() -> None:
    assert pad_token_id(make_tokenizer(pad=True)) == 2
    tokenizer = make_tokenizer()
    assert pad_token_id(tokenizer) == 1
    assert tokenizer.pad_token is None
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_data_module_has_what_a_trainer_takes() -> None:
    module = make_supervised_data_module(make_tokenizer(), edits("f1+l1"), *texts(5), max_length=64)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
    assert module["eval_dataset"] is None
    items = [module["train_dataset"][index] for index in random.sample(range(5), 3)]
    assert module["data_collator"](items)["input_ids"].shape[0] == 3
