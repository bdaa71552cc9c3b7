"""pyreft's data sets as they are by default: positions of real tokens, masks by length, the hooks of subclasses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import make_tokenizer, rows
from transformers import DataCollatorForSeq2Seq

import reft_kernels as pyreft

SUPERVISED = {"instruction_field": "instruction", "input_field": "input", "output_field": "output"}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def supervised(given: Any = None, tokenizer: Any = None, **options: Any) -> pyreft.ReftSupervisedDataset:
    settings = {"position": "f2+l3", "num_interventions": 2, **SUPERVISED, **options}
    tokenizer = tokenizer if tokenizer is not None else make_tokenizer(bos=True)
    return pyreft.ReftSupervisedDataset(
        "task", None, tokenizer, dataset=rows(4) if given is None else given, **settings
    )


def prompt_length(item: dict[str, Any]) -> int:
    return int((item["labels"] == -100).sum())


def test_an_item_of_instructions() -> None:
    tokenizer = make_tokenizer(bos=True)
    for made, item in zip(rows(4), supervised(tokenizer=tokenizer), strict=True):
        text = tokenizer.decode(item["input_ids"])
        assert text == f"<s>{ALPACA}\n\n### Instruction:\n{made['instruction']}\n\n### Response:\n{made['output']}</s>"
        assert tokenizer.decode(item["input_ids"][prompt_length(item) :]) == made["output"] + "</s>"
        assert item["labels"][prompt_length(item) :].equal(item["input_ids"][prompt_length(item) :])
        assert item["attention_mask"].tolist() == [1] * len(item["input_ids"])
        last = prompt_length(item) - 1
        assert item["intervention_locations"] == [[0, 1, -1], [last - 2, last - 1, last]]
    assert [item["id"] for item in supervised()] == [0, 1, 2, 3]
    without = supervised(no_stop=True, tokenizer=tokenizer)[1]
    assert without["input_ids"].tolist() == supervised(tokenizer=tokenizer)[1]["input_ids"].tolist()[:-1]
    given = [{**rows(1)[0], "input": "the box"}]
    assert "### Input:\nthe box\n" in tokenizer.decode(supervised(given, tokenizer)[0]["input_ids"])


@pytest.mark.parametrize("no_stop", [True, False])
def test_a_tokenizer_that_appends_the_end_token_changes_nothing(no_stop: bool) -> None:
    plain = supervised(no_stop=no_stop)
    appending = supervised(tokenizer=make_tokenizer(bos=True, append_eos=True), no_stop=no_stop)
    assert [str(item) for item in appending] == [str(item) for item in plain]


def test_long_texts_are_cut_at_the_tokenizers_limit() -> None:
    tokenizer = make_tokenizer(bos=True)
    length = prompt_length(supervised(tokenizer=tokenizer)[0])
    tokenizer.model_max_length = length + 2
    item = supervised(tokenizer=tokenizer)[0]
    assert (len(item["input_ids"]), prompt_length(item)) == (length + 2, length)
    tokenizer.model_max_length = length - 2
    item = supervised(tokenizer=tokenizer)[0]
    assert (len(item["input_ids"]), prompt_length(item)) == (length - 2, length - 2)


def test_items_are_copies() -> None:
    data = supervised()
    data[0]["input_ids"].zero_()
    data[0]["intervention_locations"][0][0] = 99
    assert data[0]["input_ids"].any()
    assert data[0]["intervention_locations"][0][0] == 0


def test_all_positions_are_left_to_the_model() -> None:
    assert "intervention_locations" not in supervised(position="all")[0]


@pytest.mark.parametrize("share_weights", [True, False])
def test_every_intervention_has_its_subspaces(share_weights: bool) -> None:
    data = supervised([{**row, "subspaces": [1, 3]} for row in rows(2)], share_weights=share_weights)
    assert data[0]["subspaces"] == [[1, 3], [1, 3]]


def test_raw_rows_and_completions() -> None:
    tokenizer = make_tokenizer(bos=True)
    given = rows(3)
    options = {"dataset": given, "position": "l1", "num_interventions": 1}
    raw = pyreft.ReftRawDataset(None, None, tokenizer, **options)
    fields = {"prompt_field": "instruction", "completion_field": "output"}
    completed = pyreft.ReftGenerationDataset(None, None, tokenizer, **fields, **options)
    for row, item, same in zip(given, raw, completed, strict=True):
        assert tokenizer.decode(item["input_ids"]) == f"<s>{row['instruction']}{row['output']}</s>"
        assert item["intervention_locations"] == [[prompt_length(item) - 1]]
        assert {name: str(value) for name, value in item.items()} == {name: str(value) for name, value in same.items()}
    assert [ids.tolist() for ids in raw.input_ids] == [item["input_ids"].tolist() for item in raw]
    assert raw.id == [0, 1, 2]
    assert raw.subspaces is None
    test = pyreft.ReftRawDataset(None, None, tokenizer, data_split="test", **options)
    assert test.raw_dataset is given
    assert test.labels is None
    assert tokenizer.decode(test[0]["input_ids"]) == f"<s>{given[0]['instruction']}"


@pytest.mark.parametrize(
    ("label", "wanted"),
    [(2, torch.tensor(2)), (0.5, torch.tensor(0.5)), ([1.0, 0.0], torch.tensor([1.0, 0.0]))],
)
def test_labels_of_texts(label: Any, wanted: torch.Tensor) -> None:
    tokenizer = make_tokenizer(bos=True, append_eos=True)
    given = [{"text": "the red box", "label": label, "name": "red"}]
    options = {"dataset": given, "position": "f1+l1", "num_interventions": 2, "input_field": "text"}
    item = pyreft.ReftClassificationDataset(None, None, tokenizer, label_field="label", **options)[0]
    assert torch.equal(item["labels"], wanted)
    ids = tokenizer("the red box")["input_ids"]
    assert item["input_ids"].tolist() == ids  # with the tokens that the tokenizer puts around it
    assert item["intervention_locations"] == [[0], [len(ids) - 1]]
    named = pyreft.ReftClassificationDataset(None, None, tokenizer, label_field="name", **options)[0]
    assert named["labels"].tolist() == tokenizer("red")["input_ids"]
    assert "labels" not in pyreft.ReftClassificationDataset(None, None, tokenizer, label_field=None, **options)[0]


def test_a_pair_of_answers_is_padded_and_masked_by_length() -> None:
    tokenizer = make_tokenizer()  # without a padding token
    given = [
        {"instruction": "name a colour", "good": "red", "bad": "a very long answer indeed"},
        {"instruction": "name a colour", "good": "a very long answer indeed", "bad": "red"},
    ]
    fields = {
        "instruction_field": "instruction",
        "input_field": "input",
        "chosen_output_field": "good",
        "rejected_output_field": "bad",
    }
    options = {"position": "l1", "num_interventions": 1, **fields}
    data = pyreft.ReftPreferenceDataset(None, None, tokenizer, dataset=given, **options)
    for row, item in zip(given, data, strict=True):
        real = item["attention_mask"].bool()
        assert len(item["input_ids"]) == len(item["labels"]) == len(real)
        assert tokenizer.decode(item["input_ids"][real]).endswith(f"Response:\n{row['bad']}</s>")
        assert tokenizer.decode(item["labels"][item["labels"] != -100]) == f"{row['good']}</s>"
    assert data[0]["attention_mask"].all()
    assert not data[1]["attention_mask"].all()
    test = pyreft.ReftPreferenceDataset(None, None, tokenizer, data_split="test", dataset=given, **options)
    assert set(test[0]) == {"input_ids", "attention_mask", "intervention_locations", "id"}


def test_pairs_of_conversations() -> None:
    tokenizer = make_tokenizer(pad=True, bos=True)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    given = [
        {"ask": "which colour ?", "a": "red box", "b": "blue", "score_a": 0.1, "score_b": 0.7},
        {"ask": "which colour ?", "a": "red", "b": "green", "score_a": 2, "score_b": 1},
    ]
    kept = copy.deepcopy(given)
    fields = {"prompt_field": "ask", "conv_A_field": "a", "conv_B_field": "b"}
    rewards = {"conv_A_reward_field": "score_a", "conv_B_reward_field": "score_b"}
    options = {"dataset": given, "position": "f1+l2", "num_interventions": 2, "share_weights": True}
    data = pyreft.ReftRewardDataset(None, None, tokenizer, **fields, **rewards, **options)
    assert given == kept
    first = data[0]
    assert tokenizer.decode(first["chosen_output"]) == "<s>user: which colour ? assistant: blue "
    assert (first["chosen_reward"], first["rejected_reward"]) == (0.7, 0.1)
    for item in data:
        last = max(item["intervention_locations"][0])
        assert item["chosen_output"][: last + 1].equal(item["rejected_output"][: last + 1])
        assert item["chosen_output"][last + 1] != item["rejected_output"][last + 1]
    batch = pyreft.ReftRewardCollator(tokenizer)([data[0], data[1]])
    assert batch["input_ids"].shape[0] == batch["attention_mask"].shape[0] == 4
    torch.testing.assert_close(batch["reward"], torch.tensor([0.7, 0.1, 2.0, 1.0]))
    assert batch["intervention_locations"].shape == (4, 2, 3)
    assert batch["intervention_locations"][0].equal(batch["intervention_locations"][1])
    unrated = pyreft.ReftRewardDataset(None, None, tokenizer, **fields, **options)
    assert pyreft.ReftRewardCollator(tokenizer)([unrated[0]])["reward"].tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match="both, or neither"):
        pyreft.ReftRewardDataset(None, None, tokenizer, **fields, conv_A_reward_field="score_a", **options)


def test_at_most_so_many_rows() -> None:
    chosen = supervised(rows(20), max_n_example=5, seed=7)
    assert len(chosen) == 5
    assert [row["instruction"] for row in chosen.task_dataset] != [row["instruction"] for row in rows(5)]
    again = supervised(rows(20), max_n_example=5, seed=7)
    assert again.task_dataset == chosen.task_dataset
    assert supervised(rows(20), max_n_example=5, seed=8).task_dataset != chosen.task_dataset
    assert len(supervised(rows(3), max_n_example=50)) == 3


def test_a_json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(4)), encoding="utf-8")
    options = {"position": "f2+l3", "num_interventions": 2}
    data = pyreft.ReftSupervisedDataset(None, str(path), make_tokenizer(bos=True), **options, **SUPERVISED)
    assert [str(item) for item in data] == [str(item) for item in supervised()]


class Words(pyreft.ReftDataset):
    """A subclass as pyreft's scripts write them."""

    pyreft_compat = False

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        self.field = kwargs["field"]

    def load_dataset(self) -> Any:
        return [{"word": word} for word in ("red", "green box")]

    def postprocess(self, kwargs: dict[str, Any]) -> None:
        kwargs["count"] = len(self.task_dataset)

    def tokenize(self, data_item: Any) -> tuple[dict[str, Any], int]:
        ids = torch.tensor(self.tokenizer(data_item[self.field])["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, len(ids)

    def get_intervention_locations(self, **kwargs: Any) -> list[list[int]]:
        assert kwargs["count"] == 2
        return [[kwargs["last_position"] - 1]]


def test_a_subclass_overrides_what_it_likes() -> None:
    tokenizer = make_tokenizer(bos=True)
    data = Words("task", None, tokenizer, field="word", position="l1", num_interventions=1)
    for word, item in zip(("red", "green box"), data, strict=True):
        ids = tokenizer(word)["input_ids"]
        assert item["input_ids"].tolist() == ids
        assert item["intervention_locations"] == [[len(ids) - 1]]
        assert not item["attention_mask"].any()  # the subclass's own


def test_the_layout_of_pyreft_for_a_class_or_one_data_set() -> None:
    class Sunk(Words):
        pyreft_compat = True

    options = {"field": "word", "position": "l1", "num_interventions": 1}
    tokenizer = make_tokenizer(bos=True, pad=True)
    old = Sunk("task", None, tokenizer, **options)[0]
    new = Words("task", None, tokenizer, **options)[0]
    assert old["input_ids"].tolist() == [2, *new["input_ids"].tolist()]
    assert old["attention_mask"].tolist() == [0] + [1] * len(new["input_ids"])
    assert old["intervention_locations"] == [[new["intervention_locations"][0][0] + 1]]
    again = Words("task", None, tokenizer, pyreft_compat=True, **options)[0]
    assert again["input_ids"].equal(old["input_ids"])
    assert Sunk("task", None, tokenizer, pyreft_compat=False, **options)[0]["input_ids"].equal(new["input_ids"])


def test_what_data_sets_refuse() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(TypeError, match="abstract"):
        pyreft.ReftDataset("task", None, tokenizer, position="l1")  # type: ignore[abstract]
    with pytest.raises(TypeError, match="the keyword position is missing"):
        pyreft.ReftRawDataset("task", None, tokenizer, dataset=rows(1), num_interventions=1)
    with pytest.raises(TypeError, match="the keyword output_field is missing"):
        pyreft.ReftSupervisedDataset("task", None, tokenizer, dataset=rows(1), position="l1", input_field="input")
    with pytest.raises(ValueError, match="positions must be"):
        supervised(position="7")
    with pytest.raises(ValueError, match="even number"):
        supervised(num_interventions=3)
    with pytest.raises(ValueError, match="nothing to load"):
        pyreft.ReftRawDataset(None, None, tokenizer, position="l1")
    with pytest.raises(ValueError, match="nothing to load"):
        pyreft.ReftSupervisedDataset(None, None, tokenizer, position="l1", **SUPERVISED)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        supervised(tokenizer=tokenizer)


# Functions from prompts and outputs

PROMPTS = ["which colour is the red box ?", "re"]
OUTPUTS = ["red", "blue"]


@pytest.mark.parametrize("chat", [True, False])
def test_last_position_module(chat: bool) -> None:
    pytest.importorskip("datasets")
    make = (
        pyreft.make_last_position_supervised_chat_data_module
        if chat
        else pyreft.make_last_position_supervised_data_module
    )
    tokenizer = make_tokenizer(pad=True, bos=True)
    module = make(tokenizer, None, PROMPTS, OUTPUTS, 3)
    for prompt, output, item in zip(PROMPTS, OUTPUTS, module["train_dataset"], strict=True):
        length = len(tokenizer(prompt)["input_ids"])
        assert tokenizer.decode(item["input_ids"]) == f"<s>{prompt}{output}</s>"
        assert item["labels"] == [-100] * length + item["input_ids"][length:]
        assert item["intervention_locations"] == [[length - 1]] * 3
    batch = module["data_collator"](list(module["train_dataset"]))
    assert batch["intervention_locations"].shape == (2, 3, 1)
    assert (
        batch["attention_mask"].sum(1) == torch.tensor([len(x["input_ids"]) for x in module["train_dataset"]])
    ).all()
    nonstop = make(tokenizer, None, PROMPTS, OUTPUTS, nonstop=True)["train_dataset"]
    assert tokenizer.decode(nonstop[1]["input_ids"]) == "<s>reblue"
    with pytest.raises(ValueError, match="2 inputs and 1 outputs"):
        make(tokenizer, None, PROMPTS, OUTPUTS[:1])


def test_a_prompt_of_one_token_has_a_last_token() -> None:
    pytest.importorskip("datasets")
    module = pyreft.make_last_position_supervised_data_module(make_tokenizer(pad=True), None, ["r"], ["ed"])
    assert module["train_dataset"][0]["intervention_locations"] == [[0]]


def test_multiple_position_module() -> None:
    pytest.importorskip("datasets")
    tokenizer = make_tokenizer(pad=True, bos=True)
    make = pyreft.make_multiple_position_supervised_data_module
    module = make(tokenizer, None, PROMPTS, OUTPUTS, positions="f2+l3", num_interventions=2)
    first, second = module["train_dataset"]
    last = len(tokenizer(PROMPTS[0])["input_ids"]) - 1
    assert first["intervention_locations"] == [[0, 1, -1], [last - 2, last - 1, last]]
    assert second["intervention_locations"] == [[0, -1, -1], [1, -1, -1]]
    tied = make(tokenizer, None, PROMPTS, OUTPUTS, "f1+l1", 1, share_weights=True)
    assert tied["train_dataset"][0]["intervention_locations"] == [[0, last]]
    assert "intervention_locations" not in make(tokenizer, None, PROMPTS, OUTPUTS, "all")["train_dataset"].column_names


# Collators


def collator(tokenizer: Any, **options: Any) -> pyreft.ReftDataCollator:
    return pyreft.ReftDataCollator(data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"), **options)


def items(*locations: Any, **others: Any) -> list[dict[str, Any]]:
    return [
        {"input_ids": list(range(3, 6 + k)), "labels": [7] * (3 + k), "intervention_locations": rows, **others}
        for k, rows in enumerate(locations)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_takes_rows_of_any_length(side: str) -> None:
    tokenizer = make_tokenizer(pad=True)
    tokenizer.padding_side = side
    given = items([[0], [1, 2]], [[-1, 3], [2]], subspaces=[[0, 1], [2, 3]])
    kept = copy.deepcopy(given)
    batch = collator(tokenizer)(given)
    assert given == kept
    shift = 1 if side == "left" else 0
    wanted = [[[0 + shift, -1], [1 + shift, 2 + shift]], [[-1, 3], [2, -1]]]
    assert batch["intervention_locations"].tolist() == wanted
    assert batch["subspaces"].tolist() == [[[0, 1], [2, 3]]] * 2
    assert batch["intervention_locations"].dtype == batch["subspaces"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 4)


def test_collator_of_items_without_locations() -> None:
    given = [{name: value for name, value in item.items() if name == "input_ids"} for item in items([[0]], [[0]])]
    batch = collator(make_tokenizer(pad=True))(given)
    assert "intervention_locations" not in batch
    assert batch["input_ids"].shape == (2, 4)
    dummies = collator(make_tokenizer(pad=True))(items([], []))
    assert dummies["intervention_locations"].shape == (2, 0)


def test_what_collators_refuse() -> None:
    collate = collator(make_tokenizer(pad=True))
    with pytest.raises(ValueError, match="one number of interventions"):
        collate(items([[0]], [[0], [1]]))
    some = items([[0]], [[0]])
    del some[1]["intervention_locations"]
    with pytest.raises(ValueError, match="1 of 2 items of a batch have intervention_locations"):
        collate(some)
    ragged = items([[0]], [[0]])
    ragged[0]["subspaces"], ragged[1]["subspaces"] = [[0, 1]], [[0]]
    with pytest.raises(ValueError, match="subspaces of one batch must have one shape"):
        collate(ragged)
