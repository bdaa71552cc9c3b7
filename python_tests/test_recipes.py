"""Recipes: the paper's numbers, own files, and settings from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reft_kernels.cli import main
from reft_kernels.jobs.language import LanguageJob
from reft_kernels.positions import parse_positions
from reft_kernels.recipes import OPTIONS, JobSettings, find_recipe, list_recipes, read_assignment, read_recipes
from reft_kernels.training.decoding import decoding_settings
from reft_kernels.training.glue import glue_task
from reft_kernels.training.prompts import prompt_style


def test_every_family_of_the_paper_is_there_for_both_methods() -> None:
    names = set(list_recipes())
    tasks = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
    wanted = {f"glue/{task}{ending}" for task in tasks for ending in ("", "/large", "/direft", "/direft/large")}
    for family in ("commonsense", "math", "gsm8k", "instruct/ultrafeedback", "instruct/alpaca"):
        wanted |= {family, f"{family}/direft"}
        assert find_recipe(family).settings.method == "loreft"
        assert find_recipe(f"{family}/direft").settings.method == "nodireft"
    assert wanted | {"memorise", "compose", "few-shot"} <= names


@pytest.mark.parametrize("name", list(list_recipes()))
def test_a_recipe_names_what_there_is(name: str) -> None:
    recipe = list_recipes()[name]
    settings = recipe.settings
    parse_positions(settings.positions)
    prompt_style(settings.style)
    if settings.task == "language":
        LanguageJob(settings)
    if settings.glue is not None:
        glue_task(settings.glue)
    assert recipe.title
    assert "paper" in recipe.source or "authors" in recipe.source
    assert recipe.seeds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # table 9, 10, 11 and 12 of the paper, a column each
        ("glue/cola", {"positions": "f3", "dropout": 0.2, "lr": 4e-4, "warmup": 0.005, "epochs": 60, "batch_size": 32}),
        ("glue/qnli", {"positions": "f11", "dropout": 0.05, "lr": 9e-4, "warmup": 0.1, "epochs": 20}),
        ("glue/stsb/large", {"positions": "f3", "dropout": 0.05, "lr": 8e-4, "warmup": 0.2, "epochs": 30}),
        ("glue/rte/direft", {"positions": "f1", "dropout": 0.0, "lr": 9e-4, "weight_decay": 0.04, "batch_size": 8}),
        ("glue/mrpc/direft/large", {"positions": "f1", "dropout": 0.1, "lr": 9e-4, "warmup": 0.0, "epochs": 50}),
        ("glue/mnli", {"positions": "f1", "eval_split": "validation_matched", "max_length": 256, "rank": 1}),
        # the authors' commands
        ("commonsense", {"rank": 8, "positions": "f7+l7", "epochs": 6, "batch_size": 16, "accumulation": 2}),
        ("math", {"epochs": 12, "max_new_tokens": 512, "warmup": 0.1}),
        ("gsm8k/direft", {"rank": 4, "tied": False, "dropout": 0.05, "weight_decay": 0.06, "held_out": "last:300"}),
        ("instruct/ultrafeedback", {"layers": "3;9;18;24", "rank": 4, "positions": "f5+l5", "max_length": 768}),
        ("instruct/ultrafeedback", {"lr": 9e-4, "epochs": 9, "batch_size": 4, "accumulation": 32, "warmup": 0.0}),
        ("instruct/alpaca", {"layers": "8;19", "positions": "f1+l1", "lr": 2e-5, "epochs": 1, "scheduler": "cosine"}),
        ("commonsense", {"lr": 9e-4, "dropout": 0.0, "warmup": 0.1, "weight_decay": 0.0, "layers": "all"}),
        ("commonsense/epochs-3", {"epochs": 3, "batch_size": 16, "accumulation": 1}),
        ("math", {"lr": 9e-4, "rank": 8, "positions": "f7+l7", "batch_size": 16, "accumulation": 2}),
        ("math/sampled", {"temperature": 0.3, "top_p": 0.75, "top_k": 40, "num_beams": 4}),
        ("compose", {"rank": 8, "positions": "l1", "epochs": 3, "lr": 5e-3, "batch_size": 8, "warmup": 0.0}),
        ("few-shot", {"rank": 4, "layers": "15", "positions": "l1", "epochs": 100, "lr": 4e-3, "batch_size": 10}),
        ("memorise", {"method": "consreft", "rank": 1, "positions": "l1", "epochs": 1000, "lr": 4e-3}),
    ],
)  # fmt: skip
def test_the_numbers_are_those_of_the_paper(name: str, expected: dict[str, Any]) -> None:
    settings = find_recipe(name).settings
    assert {key: getattr(settings, key) for key in expected} == expected


GLUE_TABLES = {
    # positions, dropout, learning rate in 1e-4, warmup, epochs; MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B
    "": ("1 3 3 3 11 11 3 3", ".05 .1 .05 .2 .05 .05 .05 .05", "6 6 3 4 9 6 9 6", ".06 .1 0 .005 .1 0 0 .03",
         "40 40 40 60 20 40 60 60"),
    "/large": ("1 3 3 3 11 11 3 3", ".05 .05 .2 .2 .05 .05 .05 .05", "6 6 3 1 9 6 6 8", "0 .1 .06 .2 .1 .06 0 .2",
               "20 20 30 30 20 20 30 30"),
    "/direft": ("1 3 5 1 11 11 1 3", ".05 .1 .05 0 .05 .05 0 .05", "6 6 3 6 9 6 9 6", ".06 .1 .1 0 .1 0 0 .03",
                "40 40 40 60 20 40 60 60"),
    "/direft/large": ("1 3 1 1 11 7 3 3", ".05 .05 .1 .15 .05 .05 .05 .05", "6 6 9 9 9 9 6 8", "0 .1 0 0 .1 .1 0 .1",
                      "20 20 50 60 20 20 30 30"),
}  # fmt: skip
# What is 0 (weight decay) or 32 (batch size) elsewhere.
GLUE_EXCEPTIONS = {
    "glue/cola/direft": {"weight_decay": 0.04},
    "glue/rte/direft": {"weight_decay": 0.04, "batch_size": 8},
    "glue/rte/direft/large": {"weight_decay": 0.006},
}


@pytest.mark.parametrize("ending", list(GLUE_TABLES))
def test_every_number_of_the_glue_tables(ending: str) -> None:
    columns = [[float(text) for text in row.split()] for row in GLUE_TABLES[ending]]
    tasks = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
    for task, prefix, dropout, lr, warmup, epochs in zip(tasks, *columns, strict=True):
        name = f"glue/{task}{ending}"
        wanted = {
            "positions": f"f{prefix:.0f}", "dropout": dropout, "lr": pytest.approx(lr * 1e-4), "warmup": warmup,
            "epochs": epochs, "weight_decay": 0.0, "batch_size": 32, "rank": 1, "layers": "all", "max_length": 256,
            "scheduler": "linear", "accumulation": 1, "best_epoch": True, "held_out": "glue",
            **GLUE_EXCEPTIONS.get(name, {}),
        }  # fmt: skip
        settings = find_recipe(name).settings
        assert {key: getattr(settings, key) for key in wanted} == wanted, name
        assert find_recipe(name).seeds == (42, 43, 44, 45, 46)


def test_sizes_are_those_of_the_paper() -> None:
    """Trained parameters follow from rank, layers and groups: 0.031 % of LLaMA-7B, 0.0039 % of Llama-2-7B."""
    for name, groups, layers, share in (("commonsense", 1, 32, 0.031), ("instruct/ultrafeedback", 2, 4, 0.0039)):
        settings = find_recipe(name).settings
        assert groups == (1 if settings.tied else 2)
        count = layers * groups * (2 * settings.rank * 4096 + settings.rank)
        assert 100 * count / 6.738e9 == pytest.approx(share, rel=0.02)


def test_own_files_extend_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    entry = {"extends": "glue/cola", "settings": {"epochs": 2}}
    path.write_text(
        json.dumps({"recipes": {"short": entry, "shorter": {"extends": "short", "settings": {"lr": 1e-3}}}})
    )
    short, shorter = find_recipe(f"{path}:short"), find_recipe(f"{path}:shorter")
    assert short.settings.epochs == shorter.settings.epochs == 2
    assert (short.settings.lr, shorter.settings.lr) == (4e-4, 1e-3)
    assert shorter.seeds == (42, 43, 44, 45, 46)
    with pytest.raises(ValueError, match=r"has the recipes short, shorter: name one as .*mine\.json:NAME"):
        find_recipe(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", 'expected an object with "recipes"'),
        ('{"recipes": {"a": {"settings": {"rnak": 3}}}}', "recipe 'a': unknown setting 'rnak'; near: rank"),
        ('{"recipes": {"a": {"settings": {"rank": 0}}}}', "recipe 'a': rank must be at least 1, got 0"),
        ('{"recipes": {"a": {"settings": {"rank": "8"}}}}', "recipe 'a': rank must be a whole number, got '8'"),
        ('{"recipes": {"a": {"extends": "a"}}}', "recipe 'a' extends itself"),
        (
            '{"recipes": {"a": {"extends": "nothing"}}}',
            "extends 'nothing', which is neither in the file nor in the pack",
        ),
        ('{"recipes": {"a": {"extends": "mine.json:a"}}}', "extends 'mine.json:a', which is neither"),
        ('{"recipes": {"a": 3}}', "recipe 'a' must be an object with settings, got 3"),
        ('{"recipes": {"a": {"settings": []}}}', "recipe 'a' must be an object with settings"),
        ("[" * 100_000, "not valid JSON"),
        (
            '{"family": {"name": "{task}", "tasks": ["cola"], "seeds": [1], "settings": {"rnak": 1}, "variants": {"": '
            '{"title": "{task:>99999999999}", "source": "", "settings": {}, "columns": {}}}}}',
            "unknown setting 'rnak'",
        ),
        ('{"recipes": {"a": {"colour": 1}}}', "recipe 'a' has unknown fields: colour"),
        ('{"recipes": {"a": {"settings": {"task": "classification"}}}}', "glue must be named for a classification"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json: ") as caught:
        read_recipes(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=1e-3", ("lr", 1e-3)),
        ("batch-size=4", ("batch_size", 4)),
        ("tied=false", ("tied", False)),
        ("data=a.json,b.json", ("data", ("a.json", "b.json"))),
        ("pad_to=64,128", ("pad_to", (64, 128))),
        ("max_steps=none", ("max_steps", None)),
        ("template=Q: %s\\nA:", ("template", "Q: %s\nA:")),
    ],
)
def test_assignments(text: str, value: tuple[str, Any]) -> None:
    assert read_assignment(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "expected key=value, got 'lr'"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("lr=nan", "lr must be a finite number"),
        ("rank=1.5", "rank must be a whole number, got '1.5'"),
        ("rank=0", "rank must be at least 1, got 0"),
        ("method=prefix", "method must be one of loreft"),
        ("tied=maybe", "tied must be true or false, got 'maybe'"),
        ("learning_rate=1", "unknown setting 'learning_rate'"),
    ],
)
def test_assignments_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_assignment(text)


def test_settings_survive_json() -> None:
    for name in ("glue/rte/direft/large", "instruct/ultrafeedback", "compose"):
        settings = find_recipe(name).settings
        assert JobSettings.of(json.loads(json.dumps(settings.as_dict()))) == settings
    assert set(OPTIONS) == set(JobSettings().as_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"subspaces": ["0-3"], "data": ["a", "b"]}, "subspaces must be one for each of data"),
        ({"subspaces": ["3-0"], "data": ["a"]}, "ranges of directions"),
        ({"streaming": 10, "data": ["a"]}, "streaming needs max_steps"),
        ({"streaming": 10, "data": ["a"], "max_steps": 3, "held_out": "last:3"}, "does not go with held_out 'last:3'"),
        ({"template": "no place"}, 'template must hold "%s" exactly once'),
        ({"glue": "cola"}, "glue must be named for a classification and for nothing else"),
        ({"held_out": "glue"}, "held_out 'glue' is for classifications"),
        ({"subspaces": ["0"], "data": ["a"], "method": "lora"}, "subspaces are of the method loreft, not of lora"),
        ({"subspaces": ["0"], "data": ["a"], "packing": 64}, "subspaces does not go with packing"),
        ({"cache_frozen": "memory", "packing": 64}, "cache_frozen does not go with packing"),
        ({"cache_frozen": "memory", "compile": "default"}, "cache_frozen does not go with compile"),
        (
            {"cache_frozen": "disk", "gradient_checkpointing": True},
            "cache_frozen does not go with gradient_checkpointing",
        ),
        ({"cache_frozen": "disk", "step_graphs": True}, "cache_frozen does not go with step_graphs"),
        ({"gradient_checkpointing": True, "step_graphs": True}, "step_graphs does not go with gradient_checkpointing"),
        (
            {"compile": "max-autotune", "step_graphs": True},
            "does not go with compile 'max-autotune', which makes graphs",
        ),
        ({"epochs": 0}, "epochs must be above 0 where max_steps is not given"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
    ],
)
def test_settings_that_do_not_fit_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobSettings.of(values)


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_recipes())
    assert main(["recipes", "glue/cola"]) == 0
    said = capsys.readouterr().out
    assert "source   paper, table 9" in said
    assert "lr                 0.0004" in said
    assert main(["recipes", "glue/cola", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["recipes"]["glue/cola"]
    assert JobSettings.of(shown["settings"]) == find_recipe("glue/cola").settings
    assert main(["recipes", "gleu/cola"]) == 2
    assert "recipe: unknown recipe 'gleu/cola'; near: glue/cola" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["commonsense", "math", "gsm8k"])
def test_recipes_decode_as_the_library_does(name: str) -> None:
    decoding = decoding_settings(name)
    settings = find_recipe(name).settings
    assert settings.max_new_tokens == decoding["max_new_tokens"]
    assert (settings.temperature == 0.0) == (not decoding["do_sample"])
