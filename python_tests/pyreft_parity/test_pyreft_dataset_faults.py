"""The faults of pyreft's data sets and collators: each is shown on pyreft, and that ours has none of it."""

from __future__ import annotations

import copy
from typing import Any

import pyreft
import pytest
import torch
from data_peer import CLASSES, EARLY, both, items, plain, row, rows, tokenizer
from pyreft import dataset as stock
from training_support import make_llama, make_tokenizer
from transformers import DataCollatorForSeq2Seq

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training.collators import ReftDataCollator, ReftRewardCollator
from reft_kernels.training.data_modules import (
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from reft_kernels.training.pair_datasets import ReftRewardDataset


@pytest.mark.parametrize("name", EARLY)
def test_the_suffix_ends_one_token_early(name: str) -> None:
    theirs, compat, ours = both(name, [row(0)], position="l1")
    made = tokenizer()
    _, _, fields = CLASSES[name]
    if name == "supervised":
        prompt = stock.prompt_input % (row(0)["instruction"], row(0)["input"])
    else:
        prompt = row(0)[fields.get("prompt_field", "instruction")]
    length = len(made(prompt)["input_ids"])
    # Behind pyreft's sink the last token of the prompt is number `length`.
    assert theirs[0]["intervention_locations"] == [[length - 1]] * 4
    assert compat[0]["intervention_locations"] == [[length - 1]] * 4
    assert ours[0]["intervention_locations"] == [[length - 1]] * 4
    assert theirs[0]["input_ids"][length - 1] == ours[0]["input_ids"][length - 2]


@pytest.mark.parametrize("name", ["raw", "supervised", "generation", "preference"])
def test_tokens_equal_to_the_padding_token_are_masked(name: str) -> None:
    """Where the padding token is the end token, the model never attends the end that it is to learn from."""
    made = tokenizer()
    made.pad_token = made.eos_token
    given = [{**one, "rejected": "a", "output": "the 1st, 2nd and 3rd answer"} for one in rows()]
    theirs, compat, ours = both(name, given, made)
    assert items(compat) == items(theirs)
    for old, new in zip(items(theirs), items(ours), strict=True):
        ids, mask = old["input_ids"][1], old["attention_mask"][1]
        assert made.eos_token_id in ids[1:]
        assert [kept for kept, token in zip(mask, ids, strict=True) if token == made.eos_token_id and kept] == []
        ids, mask = new["input_ids"][1], new["attention_mask"][1]
        padding = len(ids) - 1 - ids.index(made.eos_token_id)  # in the preference data alone
        assert (padding > 0) == (name == "preference")
        assert mask == [1] * (len(ids) - padding) + [0] * padding


def inner(made: Any) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer=made, label_pad_token_id=-100, padding="longest")


def test_rows_of_different_lengths_are_no_batch() -> None:
    """pyreft's own locations for a prompt of one token are wider than those of all others."""
    made = tokenizer(bos=False)
    assert len(made("r")["input_ids"]) == 1
    prompts, outputs = ["r", "which colour is the red box ?"], ["red", "red"]
    arguments = (made, None, prompts, outputs, "f2+l1", 2)
    theirs = stock.make_multiple_position_supervised_data_module(*arguments)
    batch = [theirs["train_dataset"][index] for index in range(2)]
    with pytest.raises(ValueError, match=r"intervention_locations|create tensor"):
        theirs["data_collator"](batch)
    assert ReftDataCollator(inner(made))(batch)["intervention_locations"].shape == (2, 2, 3)
    ours = make_multiple_position_supervised_data_module(*arguments)
    found = ours["data_collator"]([ours["train_dataset"][index] for index in range(2)])
    last = len(made(prompts[1])["input_ids"]) - 1
    assert found["intervention_locations"].tolist() == [[[-1, -1], [-1, -1]], [[0, 1], [last, -1]]]


def test_empty_slots_edit_the_first_token_of_the_output() -> None:
    made = tokenizer()
    prompts, outputs = ["re"], ["red"]
    length = len(made("re")["input_ids"])
    arguments = (made, None, prompts, outputs, "f7+l7", 2)
    theirs = stock.make_multiple_position_supervised_data_module(*arguments)["train_dataset"][0]
    assert {line[-1] for line in theirs["intervention_locations"]} == {length}
    assert theirs["labels"][length] != -100
    ours = make_multiple_position_supervised_data_module(*arguments)["train_dataset"][0]
    assert {line[-1] for line in ours["intervention_locations"]} == {-1}
    assert max(p for line in ours["intervention_locations"] for p in line) == length - 1


@pytest.mark.parametrize("kind", ["last", "multiple"])
def test_padding_on_the_left_moves_the_tokens_away_from_their_positions(kind: str) -> None:
    made = tokenizer()
    made.padding_side = "left"
    prompts = ["which colour is the red box ?", "which colour is the red box please please ?"]
    name = f"make_{kind}_position_supervised_data_module"
    make = {
        "last": make_last_position_supervised_data_module,
        "multiple": make_multiple_position_supervised_data_module,
    }[kind]
    theirs = getattr(stock, name)(made, None, prompts, ["red", "red"], num_interventions=2)
    ours = make(made, None, prompts, ["red", "red"], num_interventions=2)

    def last_edited(module: dict[str, Any]) -> tuple[int, int]:
        """Where the short prompt is edited last, and where its last token is."""
        batch = module["data_collator"]([module["train_dataset"][index] for index in range(2)])
        assert batch["attention_mask"][0, 0] == 0
        first_label = int((batch["labels"][0] != -100).nonzero()[0])
        return int(batch["intervention_locations"][0, -1].max()), first_label - 1

    edited, wanted = last_edited(theirs)
    assert edited < wanted
    edited, wanted = last_edited(ours)
    assert edited == wanted


def test_tied_interventions_have_half_of_their_subspaces() -> None:
    given = rows(subspaces=[0, 2])
    for tied in (True, False):
        theirs, compat, ours = both("supervised", given, share_weights=tied)
        assert items(compat) == items(theirs)
        assert [len(item["subspaces"]) for item in items(theirs)] == [2 if tied else 4] * 8
        assert [item["subspaces"] for item in items(ours)] == [[[0, 2]] * 4] * 8
        assert {len(item["intervention_locations"]) for item in items(ours)} == {4}


def test_the_reward_data_set_rewrites_the_rows_it_is_given() -> None:
    _, _, fields = CLASSES["reward"]
    given = rows(3)
    kept = copy.deepcopy(given)
    settings = {"dataset": given, "position": "l1", "num_interventions": 1, **fields}
    for compat in (False, True):
        first = ReftRewardDataset("task", None, tokenizer(), pyreft_compat=compat, **settings)
        assert given == kept
        again = ReftRewardDataset("task", None, tokenizer(), pyreft_compat=compat, **settings)
        assert items(again) == items(first)
    first = stock.ReftRewardDataset("task", None, tokenizer(), **settings)
    assert given != kept
    again = stock.ReftRewardDataset("task", None, tokenizer(), **settings)
    assert items(again) != items(first)  # messages within messages


def test_start_tokens_are_taken_out_of_chats() -> None:
    """Where the start token also begins every message, as in ChatML, pyreft's chats have no beginnings left."""
    made = tokenizer(bos=False)
    made.chat_template = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    theirs, compat, ours = both("reward", rows(3), made)
    assert items(compat) == items(theirs)
    for old, new in zip(items(theirs), items(ours), strict=True):
        assert old["chosen_output"][1][1:].count(made.bos_token_id) == 0
        assert new["chosen_output"][1].count(made.bos_token_id) == 2
    made.bos_token = None
    with pytest.raises(TypeError):
        both("reward", rows(3), made)
    _, ours_class, fields = CLASSES["reward"]
    settings = {"dataset": rows(3), "position": "l1", "num_interventions": 1, **fields}
    assert len(ours_class("task", None, made, **settings)) == 3


def test_where_one_chat_continues_the_other_a_common_token_is_lost() -> None:
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    given = [{"prompt": "which colour ? ", "a": "red", "b": "red box"}]
    fields = {"prompt_field": "prompt", "conv_A_field": "a", "conv_B_field": "b"}
    settings = {"dataset": given, "position": "l1", "num_interventions": 1, **fields}
    common = len(made("which colour ? red")["input_ids"])
    ours = ReftRewardDataset("task", None, made, **settings)
    assert ours[0]["intervention_locations"] == [[common - 1]]
    compat = ReftRewardDataset("task", None, made, pyreft_compat=True, **settings)
    theirs = stock.ReftRewardDataset("task", None, made, **copy.deepcopy(settings))
    assert items(compat) == items(theirs)
    assert theirs[0]["intervention_locations"] == [[common - 1]]  # one early, behind the sink


def test_a_missing_input_is_written_out_as_none() -> None:
    given = [{**row(0), "input": None}]
    theirs, compat, ours = both("supervised", given)
    made = tokenizer()
    assert items(compat) == items(theirs)
    assert "None" in made.decode(theirs[0]["input_ids"])
    assert "None" not in made.decode(ours[0]["input_ids"])


def test_a_tokenizer_without_a_limit() -> None:
    made = make_tokenizer(pad=True)
    theirs, ours, fields = CLASSES["supervised"]
    settings = {"dataset": rows(2), "position": "l1", "num_interventions": 1, **fields}
    with pytest.raises(OverflowError):
        theirs("task", None, made, **settings)
    assert len(ours("task", None, made, **settings)) == 2
    with pytest.raises(OverflowError):
        pyreft.make_last_position_supervised_data_module(made, None, ["red"], ["box"])
    assert len(make_last_position_supervised_data_module(made, None, ["red"], ["box"])["train_dataset"]) == 1


@pytest.mark.parametrize("name", ["raw", "supervised", "generation", "preference"])
def test_an_end_token_that_the_tokenizer_appends_is_part_of_the_prompt(name: str) -> None:
    """It ends a prompt that goes on: the position behind the prompt is edited, and one label is lost."""
    appending, clean = tokenizer(append_eos=True), tokenizer()
    theirs, compat, ours = both(name, None, appending, position="l1")
    wanted, _, mended = both(name, None, clean, position="l1")
    assert items(compat) == items(theirs)
    assert items(ours) == items(mended)
    assert items(theirs) != items(wanted)
    for item, other in zip(items(theirs), items(wanted), strict=True):
        assert item["labels"][1].count(-100) != other["labels"][1].count(-100)


def reward_batch(collator: Any, data: Any) -> Any:
    return collator([data[index] for index in range(4)])


def test_reward_collator() -> None:
    made = tokenizer()
    theirs, compat, ours = both("reward", rows(6), made)
    wanted = reward_batch(stock.ReftRewardCollator(made), theirs)
    found = reward_batch(ReftRewardCollator(made, pyreft_compat=True), compat)
    assert plain(found) == plain(dict(wanted))
    mended = reward_batch(ReftRewardCollator(made), ours)
    assert set(mended) == set(found)
    assert mended["input_ids"].tolist() == found["input_ids"][:, 1:].tolist()
    assert mended["reward"].tolist() == found["reward"].tolist()
    assert mended["intervention_locations"].tolist() == (found["intervention_locations"] - 1).tolist()
    made.padding_side = "left"
    padded = reward_batch(ReftRewardCollator(made), ours)
    shift = (padded["attention_mask"] == 0).sum(1)[:, None, None]
    assert shift.max() > 0
    old = mended["intervention_locations"]
    assert (padded["intervention_locations"] == torch.where(old >= 0, old + shift, -1)).all()
    assert padded["intervention_locations"].dtype == torch.int64


def test_a_collator_for_the_items_of_a_data_set() -> None:
    made = tokenizer()
    theirs, compat, ours = both("supervised", None, made)
    wanted = stock.ReftDataCollator(inner(made))([theirs[index] for index in range(8)])
    found = ReftDataCollator(inner(made), pyreft_compat=True)([compat[index] for index in range(8)])
    assert plain(dict(found)) == plain(dict(wanted))
    mended = ReftDataCollator(inner(made))([ours[index] for index in range(8)])
    assert set(mended) == set(wanted)
    assert mended["input_ids"].tolist() == wanted["input_ids"][:, 1:].tolist()
    assert mended["attention_mask"].tolist() == wanted["attention_mask"][:, 1:].tolist()
    assert mended["intervention_locations"].dtype == wanted["intervention_locations"].dtype == torch.int64


def test_both_layouts_train_to_the_same_hidden_states() -> None:
    """A ReftModel gets the same loss from an item without a sink as from one with pyreft's masked sink."""
    made = tokenizer()
    theirs, _, ours = both("raw", [row(1), row(2)], made, position="f2+l2")
    model = get_reft_model(
        make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2", tied=False)
    ).eval()
    losses = []
    for data in (theirs, ours):
        batch = ReftDataCollator(inner(made))([data[0], data[1]])
        del batch["id"]
        losses.append(model(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
