"""Jobs: rows in, trained and evaluated in every way, scores and log out; resumed, held out, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_support import rows, save_encoder, save_model, sentences, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_kernels.cli import main
from reft_kernels.jobs.adapters import adapt
from reft_kernels.jobs.classification import ClassificationJob
from reft_kernels.jobs.errors import UserError
from reft_kernels.jobs.job_log import say_training
from reft_kernels.jobs.language import LanguageJob
from reft_kernels.jobs.rows import hold_out_rows, source_names
from reft_kernels.jobs.run import run_job
from reft_kernels.jobs.trainer_arguments import RunOptions, training_arguments
from reft_kernels.recipes import JobSettings
from reft_kernels.training.splits import glue_split
from reft_kernels.training.throughput import Throughput


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_encoder(tmp_path_factory.mktemp("roberta")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    numbers = [
        {"instruction": f"what is {k} plus 1 ?", "output": f"it is {k + 1}\n#### {k + 1}", "answer": str(k + 1)}
        for k in range(8)
    ]
    quiz = [
        {
            "instruction": "Please choose the correct answer to the question: which colour is the box?\n\n"
            f"Answer1: red Answer2: {colour}\n\nAnswer format: answer1/answer2",
            "output": "the correct answer is answer2",
            "answer": "answer2",
        }
        for colour in ("green", "blue", "white", "black")
    ]
    made = {
        "boxes": rows(24),
        "more": rows(8, first=30),
        "numbers": numbers,
        "quiz": quiz,
        "sentences": sentences(48),
        "others": sentences(24, first=50),
    }
    for name, content in made.items():
        (folder / name).mkdir()
        write_rows(folder / name / "train.jsonl", content)
    return {name: str(folder / name / "train.jsonl") for name in made}


def settings_of(**values: Any) -> JobSettings:
    usual = {"rank": 2, "positions": "f2+l2", "batch_size": 4, "lr": 0.02, "epochs": 1, "max_new_tokens": 6}
    return JobSettings.of({**usual, **values})


def run(settings: JobSettings, model: str, output: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The log, and what was said."""
    said: list[str] = []
    options = {"device": "cpu", "progress": False, "log_steps": 1, "save_steps": 0, "report": False, **options}
    return run_job(settings, RunOptions(model, output, **options), say=said.append), said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("values", "name", "metrics"),
    [
        ({}, "more", {"accuracy", "unanswered"}),
        ({"evaluation": "loss"}, "more", {"loss", "perplexity"}),
        ({"evaluation": "recite", "style": "memorise"}, "more", {"recited_share", "recited_tokens"}),
        ({"evaluation": "rank"}, "quiz", {"accuracy"}),
        ({"evaluation": "rank", "style": "cloze", "normalise": "byte"}, "quiz", {"accuracy"}),
        ({"evaluation": "generate", "style": "gsm8k", "rule": "gsm8k"}, "numbers", {"accuracy", "unanswered"}),
        ({"style": "math", "rule": "math", "num_beams": 2}, "numbers", {"accuracy", "unanswered"}),
    ],
)  # fmt: skip
def test_evaluations_of_language(
    language_model: str, data: dict[str, str], tmp_path: Path, values: dict[str, Any], name: str, metrics: set[str]
) -> None:
    settings = settings_of(data=[data[name]], eval_data=[data[name]], max_steps=2, **values)
    log, said = run(settings, language_model, tmp_path / "run")
    found = log["results"][name]
    assert set(found) == metrics | {"rows", "seconds"}
    count = len(Path(data[name]).read_text().splitlines())
    assert found["rows"] == count
    assert any(line.startswith(f"eval     {name}: ") for line in said)
    kept = tmp_path / "run" / "predictions" / f"{name}.jsonl"
    if values.get("evaluation") == "loss":
        assert not kept.exists()
        assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item(), rel=1e-4)
    else:
        assert len(kept.read_text().splitlines()) == count


@pytest.mark.parametrize(
    ("evaluation", "metric"), [("loss", "loss"), ("generate", "accuracy"), ("classification", "accuracy")]
)
def test_without_evaluation_data_the_held_out_rows_are_scored(
    language_model: str, encoder: str, data: dict[str, str], tmp_path: Path, evaluation: str, metric: str
) -> None:
    language = evaluation != "classification"
    values = {"evaluation": evaluation} if language else {"task": "classification", "glue": "sst2", "positions": "f3"}
    model, name = (language_model, "boxes") if language else (encoder, "sentences")
    settings = settings_of(data=[data[name]], held_out="last:7", max_steps=3, **values)
    log, said = run(settings, model, tmp_path / "run")
    last = tmp_path / "last.jsonl"
    last.write_text("".join(f"{line}\n" for line in Path(data[name]).read_text().splitlines()[-7:]))
    named, _ = run(settings.changed({"eval_data": (str(last),)}), model, tmp_path / "named")
    assert set(log["results"]) == {"held_out"}
    assert set(named["results"]) == {"last"}
    found, expected = (one["results"][key] for one, key in ((log, "held_out"), (named, "last")))
    assert found["rows"] == 7
    assert found[metric] == pytest.approx(expected[metric], rel=1e-6)
    assert any(line.startswith("eval     held_out: ") for line in said)
    assert (tmp_path / "run" / "predictions" / "held_out.jsonl").is_file() == (evaluation != "loss")
    assert run(settings.changed({"held_out": "none"}), model, tmp_path / "none")[0]["results"] == {}


def test_the_loss_is_a_mean_over_tokens(
    language_model: str, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of unlike lengths, one a batch and three: a mean of means of batches would be another number."""
    settings = settings_of(data=[data["boxes"]], held_out="last:7", eval_data=[data["boxes"]], evaluation="loss")
    log, _ = run(settings, language_model, tmp_path / "run")
    assert log["examples"] == {"used": 17, "left_out": 0, "held_out": 7, "skipped": None}
    last = [{**row, "output": row["output"] + k * " and so on"} for k, row in enumerate(rows(24)[-7:])]
    path = write_rows(tmp_path / "last.jsonl", last)
    total = count = 0.0
    base = AutoModelForCausalLM.from_pretrained(language_model).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    for row in last:
        start = len(tokenizer(row["instruction"] + "\n")["input_ids"])
        ids = torch.tensor(
            [[*tokenizer(f"{row['instruction']}\n{row['output']}")["input_ids"], tokenizer.eos_token_id]]
        )
        log_probs = base(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum())
        count += ids.shape[1] - start
    wanted = f"loss {total / count:.4f}"
    for size in ("1", "3"):
        capsys.readouterr()
        assert main(["eval", "--model", language_model, "--data", str(path), "--no-progress", "--batch-size", size,
                     "--evaluation", "loss"]) == 0  # fmt: skip
        assert wanted in capsys.readouterr().out


@pytest.mark.parametrize("method", ["loreft", "nodireft", "red", "lora", "dora"])
def test_methods_are_trained_saved_and_loaded(
    language_model: str, data: dict[str, str], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if method in ("lora", "dora"):
        pytest.importorskip("peft")
    settings = settings_of(
        data=[data["boxes"]], eval_data=[data["more"]], evaluation="loss", max_steps=6, method=method, seed=3
    )
    log, _ = run(settings, language_model, tmp_path / "run")
    assert log["parameters"]["trained"] > 0
    assert len(log["history"]) == 6
    frozen, _ = run(settings.changed({"method": "frozen"}), language_model, tmp_path / "frozen")
    assert "history" not in frozen
    assert frozen["parameters"]["trained"] == 0
    assert frozen["results"]["more"]["loss"] > log["results"]["more"]["loss"]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", data["more"], "--no-progress"]) == 0
    assert f"loss {log['results']['more']['loss']:.4f}" in capsys.readouterr().out


def test_subspaces_are_trained_apart(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    values = {"data": [data["boxes"], data["more"]], "subspaces": ["0", "1"], "max_steps": 4, "style": "alpaca"}
    both, _ = run(settings_of(**values), language_model, tmp_path / "both")
    assert both["examples"]["used"] == 32
    one = settings_of(**{**values, "data": [data["boxes"]], "subspaces": ["0"], "orthogonality": "none"})
    run(one, language_model, tmp_path / "one")
    run(one.changed({"lr": 0.0}), language_model, tmp_path / "start")
    before, after = weights(tmp_path / "start"), weights(tmp_path / "one")
    name = next(name for name in after if name.endswith("learned_source.weight"))
    assert not torch.equal(before[name][0], after[name][0])
    assert torch.equal(before[name][1], after[name][1])


def test_rows_name_their_own_subspaces(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    """As two files with a subspace each."""
    named = []
    for name, subspaces in (("boxes", [0]), ("more", [1])):
        text = Path(data[name]).read_text(encoding="utf-8")
        named += [{**json.loads(line), "subspaces": subspaces} for line in text.splitlines()]
    values = {"max_steps": 4, "style": "alpaca"}
    together = str(write_rows(tmp_path / "named.jsonl", named))
    run(settings_of(data=[together], subspaces=["rows"], **values), language_model, tmp_path / "rows")
    run(
        settings_of(data=[data["boxes"], data["more"]], subspaces=["0", "1"], **values),
        language_model, tmp_path / "files",
    )  # fmt: skip
    for name, weight in weights(tmp_path / "files").items():
        assert torch.equal(weights(tmp_path / "rows")[name], weight)
    for row, settings, message in (
        (named[0], {}, "line 1: has a field 'subspaces', which --subspaces rows reads"),
        (named[0], {"streaming": 4}, "line 1: has a field 'subspaces', which --subspaces rows reads"),
        (named[0], {"subspaces": ["0"]}, "line 1: has a field 'subspaces', which --subspaces rows reads"),
        (rows(1)[0], {"subspaces": ["rows"]}, "line 2: field 'subspaces' is missing, which --subspaces rows reads"),
        (
            {**named[0], "subspaces": [9]},
            {"subspaces": ["rows"]},
            r"line 2: subspaces must be from 0 to r - 1 .* \[9\]",
        ),
        ({**named[0], "subspaces": [0, 1]}, {"subspaces": ["rows"]}, r"line 2: .* as many as the first example's 1"),
    ):
        by_row = settings.get("subspaces") == ["rows"]
        one = str(write_rows(tmp_path / "one.jsonl", [named[0], row] if by_row else [row]))
        with pytest.raises(UserError, match=message):
            run(settings_of(data=[one], **{**values, **settings}), language_model, tmp_path / "bad")


@pytest.mark.parametrize(("task", "metric"), [("sst2", "accuracy"), ("cola", "matthews_correlation")])
def test_a_classification_keeps_its_best_epoch(
    encoder: str, data: dict[str, str], tmp_path: Path, task: str, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(
        task="classification", glue=task, data=[data["sentences"]], eval_data=[data["others"]], held_out="glue",
        best_epoch=True, epochs=4, positions="f3", max_length=32,
    )  # fmt: skip
    log, _ = run(settings, encoder, tmp_path / "run")
    scores = [entry[f"eval_{metric}"] for entry in log["held_out"] if f"eval_{metric}" in entry]
    assert len(scores) == 4
    assert log["results"]["others"]["rows"] == 12
    assert log["parameters"]["head"] > 0
    kept = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "others.jsonl").read_text().splitlines()]
    golds = [sentences(24, first=50)[k]["label"] for k in glue_split(24, 42).kept]
    assert [row["gold"] for row in kept] == golds
    if metric == "accuracy":
        assert log["results"]["others"]["accuracy"] == sum(row["answer"] == row["gold"] for row in kept) / 12
    capsys.readouterr()
    held = write_rows(tmp_path / "held.jsonl", [sentences(24, first=50)[k] for k in glue_split(24, 42).held_out])
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", str(held), "--no-progress"]) == 0
    assert f"{metric} {max(scores):.4f}" in capsys.readouterr().out


def test_the_halves_of_glue_follow_from_the_seed(data: dict[str, str]) -> None:
    job = ClassificationJob(
        settings_of(
            task="classification", glue="sst2", data=[data["sentences"]], eval_data=[data["others"]], held_out="glue",
            seed=7,
        )
    )  # fmt: skip
    job.read()
    rows_, split = sentences(24, first=50), glue_split(24, 7)
    assert job.held_out == [rows_[k] for k in split.held_out]
    assert job.evaluated == {"others": [rows_[k] for k in split.kept]}
    assert split != glue_split(24, 42)


def test_scores_of_a_regression_are_said_row_by_row(encoder: str, tmp_path: Path) -> None:
    pairs = [
        {"sentence1": row["sentence1"], "sentence2": "a box", "label": k / 2} for k, row in enumerate(sentences(8))
    ]
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    settings = settings_of(task="classification", glue="stsb", data=[str(path)], eval_data=[str(path)], positions="f1")
    log, _ = run(settings, encoder, tmp_path / "run")
    said = [json.loads(line) for line in (tmp_path / "run/predictions/pairs.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in said] == [row["label"] for row in pairs]
    table = torch.tensor([[row["answer"], row["gold"]] for row in said]).T
    assert log["results"]["pairs"]["pearson"] == pytest.approx(float(torch.corrcoef(table)[0, 1]), abs=1e-5)


@pytest.mark.parametrize(("evaluation", "metric", "best"), [("rank", "accuracy", max), ("loss", "loss", min)])
def test_a_language_model_keeps_its_best_epoch(
    language_model: str, data: dict[str, str], tmp_path: Path, evaluation: str, metric: str, best: Callable[..., float]
) -> None:
    quiz = [json.loads(line) for line in Path(data["quiz"]).read_text().splitlines()]
    other = {"output": "the correct answer is answer1", "answer": "answer1"}
    if evaluation == "loss":
        other["output"] = "%$ & ! ?"  # the more is learned, the worse for this
    held = [{**row, **other} for row in quiz[:2]]
    train, test = write_rows(tmp_path / "all.jsonl", [*quiz, *held]), write_rows(tmp_path / "held.jsonl", held)
    settings = settings_of(
        data=[str(train)], eval_data=[str(test)], held_out="last:2", best_epoch=True, epochs=4, batch_size=1, warmup=0,
        evaluation=evaluation,
    )  # fmt: skip
    log, _ = run(settings, language_model, tmp_path / "run")
    found = [entry[f"eval_{metric}"] for entry in log["held_out"] if f"eval_{metric}" in entry]
    assert len(found) == 4
    assert log["results"]["held"][metric] == pytest.approx(best(found), rel=1e-3)
    assert best(found) != found[-1] or evaluation == "rank"


def test_settings_reach_the_generation_the_trainer_and_the_adapter(language_model: str, tmp_path: Path) -> None:
    drawn = {"temperature": 0.3, "top_p": 0.75, "top_k": 40, "num_beams": 4}
    more = {"no_repeat_ngram_size": 5, "repetition_penalty": 1.1}
    found = LanguageJob(settings_of(**drawn, **more)).generation()
    assert found == {"max_new_tokens": 6, "do_sample": True, "early_stopping": True, **drawn, **more}
    assert LanguageJob(settings_of()).generation() == {"max_new_tokens": 6, "num_beams": 1}

    settings = settings_of(
        weight_decay=0.25, scheduler="cosine", seed=9, accumulation=3, max_grad_norm=0.5, eval_batch_size=7, epochs=5,
        warmup=0.125, max_steps=11,
    )  # fmt: skip
    options = RunOptions(language_model, tmp_path / "run")
    made = training_arguments(settings, options, "cpu", best=None, evaluates=False, blocks="")
    assert (made.weight_decay, made.lr_scheduler_type.value, made.seed) == (0.25, "cosine", 9)
    assert (made.gradient_accumulation_steps, made.max_grad_norm, made.max_steps) == (3, 0.5, 11)
    assert (made.per_device_train_batch_size, made.per_device_eval_batch_size) == (4, 7)
    assert (made.learning_rate, made.num_train_epochs, made.get_warmup_steps(80)) == (0.02, 5, 10)
    steps = training_arguments(settings.changed({"warmup": 6}), options, "cpu", best=None, evaluates=False, blocks="")
    assert steps.get_warmup_steps(80) == 6

    base = AutoModelForCausalLM.from_pretrained(language_model)
    edited = adapt(base, settings_of(dropout=0.25, layers="1", act_fn="relu", component="mlp_output"))
    (one,) = edited.interventions.values()
    assert (one.dropout.p, edited.representations[0].layer) == (0.25, 1)
    assert (edited.representations[0].component, one.settings()["act_fn"]) == ("mlp_output", "relu")


def test_lora_is_where_the_settings_say(language_model: str) -> None:
    pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(language_model)
    settings = settings_of(method="lora", layers="1", lora_modules=["o_proj"], lora_alpha=6, rank=3, dropout=0.25)
    model = adapt(base, settings)
    trained = [name for name, parameter in model.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(".layers.1.self_attn.o_proj.lora_" in name for name in trained)
    layer = model.model.get_submodule(trained[0].partition(".lora_")[0])
    assert (layer.scaling["default"], layer.r["default"], layer.lora_dropout["default"].p) == (2.0, 3, 0.25)


def test_the_first_rows_of_evaluation_and_the_recipe_are_told(
    language_model: str, data: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_of(data=[data["boxes"]], eval_data=[data["more"]], max_eval_examples=3, max_steps=1)
    options = RunOptions(language_model, tmp_path / "run", device="cpu", progress=False, save_steps=0)
    log = run_job(settings, options, recipe="some/recipe", say=lambda line: None)
    assert log["results"]["more"]["rows"] == 3
    assert log["recipe"] == "some/recipe"
    assert "| recipe | some/recipe |" in (tmp_path / "run" / "README.md").read_text()
    assert "<title>some/recipe</title>" in (tmp_path / "run" / "report.html").read_text()


def test_resuming_another_adapter_of_peft_is_refused(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = settings_of(data=[data["boxes"]], method="lora", max_steps=2)
    log, _ = run(settings, language_model, tmp_path / "run", save_steps=1)
    for change, message in (
        ({"rank": 4}, r"lora_A\.default\.weight must be \[4, 32\], got \[2, 32\]"),
        ({"method": "dora"}, "of another adapter: this run has as well .*lora_magnitude_vector"),
        ({"method": "frozen"}, "has no parameter base_model|of another adapter: this run has not"),
    ):
        with pytest.raises(UserError, match=f"--resume: .*checkpoint-2.*{message}"):
            run(settings.changed(change), language_model, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "train_log.json").read_text()) == json.loads(json.dumps(log))


def test_a_new_head_follows_from_the_seed(encoder: str, data: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(
        task="classification", glue="sst2", data=[data["sentences"]], positions="f3", max_steps=2, dropout=0.2
    )
    heads = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(len(heads))  # whatever was drawn before
        run(settings.changed({"seed": seed, "lr": 0.0}), encoder, tmp_path / name)
        heads.append({**load_file(tmp_path / name / "base_trainable.safetensors"), **weights(tmp_path / name)})
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    for name in ("classifier.dense.weight", next(name for name in heads[0] if name.endswith("learned_source.weight"))):
        assert not torch.equal(heads[0][name], heads[2][name])


def test_resuming_gives_the_run_that_was_not_stopped(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(
        data=[data["boxes"]], eval_data=[data["more"]], evaluation="loss", max_steps=6, dropout=0.1,
        cache_frozen="none", held_out="count:4",
    )  # fmt: skip
    whole, _ = run(settings, language_model, tmp_path / "whole", save_steps=2, keep_checkpoints=9)
    run(settings, language_model, tmp_path / "cut", save_steps=2, keep_checkpoints=9)
    for name in ("adapter.safetensors", "reft_config.json", "checkpoint-6/trainer_state.json"):
        (tmp_path / "cut" / name).unlink()
    cut, said = run(settings, language_model, tmp_path / "cut", save_steps=2, keep_checkpoints=9, resume=True)
    assert f"resume   from {tmp_path / 'cut' / 'checkpoint-4'}" in said
    assert [entry["loss"] for entry in cut["history"]] == [entry["loss"] for entry in whole["history"]]
    assert cut["results"]["more"]["loss"] == whole["results"]["more"]["loss"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "speed",
    [
        {"cache_frozen": "memory"},
        {"cache_frozen": "disk"},
        {"packing": 120},
        {"pad_to": [16, 24, 48]},
        {"gradient_checkpointing": True},
    ],
    ids=lambda speed: "-".join(map(str, speed.values())),
)
def test_what_makes_it_faster_changes_no_loss(
    language_model: str, data: dict[str, str], tmp_path: Path, speed: dict[str, Any]
) -> None:
    settings = settings_of(
        data=[data["boxes"]], eval_data=[data["more"]], evaluation="loss", epochs=2, positions="l3", held_out="count:4"
    )
    plain, _ = run(settings, language_model, tmp_path / "plain")
    fast, said = run(settings.changed(speed), language_model, tmp_path / "fast")
    wanted, found = ([entry["loss"] for entry in log["history"]] for log in (plain, fast))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert fast["results"]["more"]["loss"] == pytest.approx(plain["results"]["more"]["loss"], rel=1e-4)
    if "cache_frozen" in speed:
        assert fast["frozen_cache"]["hits"] >= 20
        assert fast["frozen_cache"]["saved_fraction"] > 0.3
        assert "mfu" not in fast
        assert any(line.startswith("cache ") for line in said)
        assert (tmp_path / "fast" / "cache").is_dir() == (speed["cache_frozen"] == "disk")


def test_a_base_model_that_a_cache_cannot_be_of(
    language_model: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_kernels.training.frozen_cache._TOLERANCE", {torch.float32: -1.0})
    settings = settings_of(data=[data["boxes"]], cache_frozen="memory", positions="l3", max_steps=2)
    with pytest.raises(UserError, match=r"--cache-frozen: .*LlamaModel computes other hidden states from kept keys"):
        run(settings, language_model, tmp_path / "run")


def test_styles_rules_templates_and_triggers() -> None:
    def target(output: str, **values: Any) -> str:
        return LanguageJob(settings_of(**values)).style.target(output)

    def answer(text: str, gold: str = "", **values: Any) -> str:
        return LanguageJob(settings_of(**values)).rule.extract(text, gold)

    assert target("red") == "red"  # of one's own rows nothing is changed
    assert target("red", style="commonsense") == "the correct answer is red"
    assert target("red", style="commonsense", trigger="Answer: ") == "Answer: red"
    assert target("a #### 3", style="gsm8k", template="Q: %s") == "a The final answer is:  3"
    assert target("red", style="cloze", template="%s") == " red"
    told = LanguageJob(settings_of(style="chat", template="Say: %s")).style
    assert told.chat
    assert told.prompt("red", "blue") == "Say: red\n\nblue"
    assert LanguageJob(settings_of(style="math", template="Q: %s")).style.prompt("red", "blue") == "Q: red\n\nblue"
    assert answer("1 and 2", "2", style="math") == answer("1 and 2", "2", style="gsm8k") == "2"
    assert answer("the correct answer is red", style="math", rule="commonsense") == "red"
    assert answer("Answer: red", trigger="Answer: ") == "red"
    assert answer(" red", style="cloze") == "red"


def test_sampled_answers_follow_from_the_seed_and_change_no_training(
    language_model: str, data: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_of(data=[data["boxes"]], eval_data=[data["more"]], held_out="last:4", dropout=0.2, epochs=2)
    plain, _ = run(settings.changed({"evaluation": "loss"}), language_model, tmp_path / "plain")
    sampled, _ = run(settings.changed({"temperature": 1.5}), language_model, tmp_path / "sampled")
    losses = [[entry["loss"] for entry in log["history"]] for log in (plain, sampled)]
    assert losses[0] == losses[1]
    said = [json.loads(line)["text"] for line in (tmp_path / "sampled/predictions/more.jsonl").read_text().splitlines()]
    words = ["eval", "--adapter", str(tmp_path / "sampled"), "--data", data["more"], "--no-progress"]
    assert main([*words, "--out", str(tmp_path / "again.jsonl")]) == 0
    assert [json.loads(line)["text"] for line in (tmp_path / "again.jsonl").read_text().splitlines()] == said


def test_eval_by_a_recipe_forgets_how_the_training_scored(
    language_model: str, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"style": "cloze", "template": "%s", "evaluation": "rank", "normalise": "byte", "temperature": 1.5}
    run(settings_of(data=[data["quiz"]], max_steps=1, **values), language_model, tmp_path / "run")
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"recipes": {"own": {"settings": {"style": "gsm8k", "max_new_tokens": 3}}}}))
    words = ["eval", "--adapter", str(tmp_path / "run"), "--data", data["numbers"], "--no-progress"]
    out = tmp_path / "said.jsonl"
    assert main([*words, "--recipe", str(own), "--out", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "First think step by step" in json.loads(out.read_text().splitlines()[0])["prompt"]


@pytest.mark.parametrize("log", ["[]", "{", "[" * 100_000, '{"settings": {"model": 3}}'])
def test_a_log_that_is_none_is_named(
    language_model: str, data: dict[str, str], tmp_path: Path, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings_of(data=[data["boxes"]], max_steps=1), language_model, tmp_path / "run")
    (tmp_path / "run" / "train_log.json").write_text(log)
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", data["more"]]) == 2
    assert "train_log.json" in capsys.readouterr().err


def test_predictions_have_files_of_their_own(language_model: str, tmp_path: Path) -> None:
    names = ["ä", "ö", "a b", "a_b", "a" * 200]
    paths = []
    for count, name in enumerate(names, start=1):
        (tmp_path / name).mkdir()
        paths.append(str(write_rows(tmp_path / name / "test.jsonl", rows(count))))
    settings = settings_of(data=paths[:1], eval_data=paths, max_steps=1, max_new_tokens=1)
    log, _ = run(settings, language_model, tmp_path / "run")
    assert list(log["results"]) == names
    files = list((tmp_path / "run" / "predictions").iterdir())
    assert sorted(len(path.read_text().splitlines()) for path in files) == [1, 2, 3, 4, 5]
    assert {"ä.jsonl", "ö.jsonl", "a_b.jsonl"} < {path.name for path in files}


def test_the_size_of_an_adapter_is_that_of_all_its_files(
    language_model: str, data: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    log, _ = run(settings_of(data=[data["boxes"]], method="lora", max_steps=1), language_model, tmp_path / "run")
    assert log["adapter_bytes"] > 4 * log["parameters"]["trained"]


def test_what_the_trainer_refuses_is_named(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--report-to: nonsense is not supported"):
        run(settings_of(data=[data["boxes"]]), language_model, tmp_path / "run", report_to=("nonsense",))


def test_streamed_rows(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(data=[data["boxes"]], streaming=8, max_steps=9, eval_data=[data["more"]], evaluation="loss")
    log, said = run(settings, language_model, tmp_path / "run")
    assert log["steps"] == 9
    assert log["examples"]["used"] is None
    assert any(line.endswith("streamed") for line in said)


def test_bad_rows_are_skipped_where_that_is_asked_for(language_model: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(6)) + '{"instruction": 3}\nnot json\n')
    settings = settings_of(data=[str(path)], max_steps=1)
    with pytest.raises(UserError, match=r"--data: .*rows\.jsonl, line 7: field 'instruction' must be text"):
        run(settings, language_model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    log, _ = run(settings.changed({"skip_bad_rows": True}), language_model, tmp_path / "run")
    assert log["examples"]["used"] == 6
    assert log["examples"]["skipped"]["count"] == 2
    assert "line 7" in log["examples"]["skipped"]["reasons"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--data: no data is named"),
        ({"data": ["nowhere.jsonl"]}, "--data nowhere.jsonl: no such file"),
        ({"data": ["boxes"], "eval_data": ["nowhere.json"]}, "--eval-data nowhere.json: no such file"),
        ({"data": ["boxes"], "style": "poem"}, "--style: style must be one of"),
        ({"data": ["boxes"], "rule": "guess"}, "--rule: rule must be one of"),
        ({"data": ["boxes"], "held_out": "half"}, "--held-out: expected"),
        ({"data": ["boxes"], "held_out": "last:24"}, "--held-out: last:24 of 24 rows leaves none on one side"),
        ({"data": ["boxes"], "best_epoch": True}, "--best-epoch: there are no held-out rows"),
        ({"data": ["boxes"], "cache_frozen": "memory", "positions": "all"}, "--cache-frozen: "),
        ({"data": ["boxes"], "style": "cloze"}, r"--data: .*line 1: expected 'Answer format: A/B'"),
        ({"data": ["boxes"], "subspaces": ["0-5"]}, "--data: .*subspaces"),
        (
            {"data": ["boxes"], "subspaces": ["0"], "method": "direft"},
            "subspaces are of the method loreft, not of direft",
        ),
        ({"data": ["boxes"], "pad_to": [4, 5]}, r"--pad-to 5: rows have up to \d\d tokens"),
        ({"data": ["boxes"], "packing": 9}, r"--packing 9: examples have up to \d\d tokens"),
        ({"data": ["boxes"], "packing": 64, "pad_to": [8, 63]}, "--pad-to 63: rows have up to 64 tokens"),
        ({"data": ["boxes"], "held_out": "share:nan"}, "--held-out: share:nan of 24 rows leaves none on one side"),
        ({"data": ["boxes"], "held_out": "share:1.5"}, "--held-out: share:1.5 of 24 rows leaves none on one side"),
        (
            {"data": ["boxes"], "eval_data": ["boxes"], "evaluation": "rank"},
            r"--eval-data: .*line 1: expected 'Answer f",
        ),
        ({"data": ["boxes"], "held_out": "last:2", "evaluation": "rank"}, r"--data: .*line 1: expected 'Answer format"),
        (
            {"data": ["boxes"], "evaluation": "loss", "held_out": "last:2", "trigger": "x", "rule": "math"},
            "--rule: a tri",
        ),
    ],
)
def test_what_is_wrong_is_named(
    language_model: str, data: dict[str, str], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    named = {name: [data.get(one, one) for one in value] if "data" in name else value for name, value in values.items()}
    with pytest.raises((UserError, ValueError), match=message):
        run(settings_of(**named), language_model, tmp_path / "run")


def test_labels_out_of_range_are_named(encoder: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*sentences(3), {"sentence1": "a", "label": 7}])
    settings = settings_of(task="classification", glue="sst2", data=[str(path)], positions="f1")
    with pytest.raises(UserError, match=r"--data: .*rows\.jsonl, line 4: label must be from 0 to 1, got 7"):
        run(settings, encoder, tmp_path / "run")
    with pytest.raises(UserError, match="--packing: is for language models"):
        run(settings.changed({"packing": 64}), encoder, tmp_path / "run")
    for name in ("subspaces", "template", "trigger"):
        value = ["0"] if name == "subspaces" else "%s"
        with pytest.raises(UserError, match=f"--{name}: is for language models"):
            run(settings.changed({name: value}), encoder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    log, _ = run(settings.changed({"skip_bad_rows": True, "max_steps": 1}), encoder, tmp_path / "run")
    assert log["examples"]["used"] == 3
    assert log["examples"]["skipped"]["count"] == 1
    assert "line 4: label must be" in log["examples"]["skipped"]["reasons"][0]


def test_few_lengths_of_texts(encoder: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", sentences(8))
    settings = settings_of(task="classification", glue="sst2", data=[str(path)], positions="f1", max_steps=3)
    undropped = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    config = json.loads((undropped / "config.json").read_text())
    no_dropout = {name: 0.0 for name in config if name.endswith("_dropout_prob")}
    (undropped / "config.json").write_text(json.dumps({**config, **no_dropout}))
    plain, _ = run(settings, str(undropped), tmp_path / "plain")
    padded, _ = run(settings.changed({"pad_to": [16]}), str(undropped), tmp_path / "padded")
    wanted, found = ([entry["loss"] for entry in log["history"]] for log in (plain, padded))
    assert found == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match=r"--pad-to 3: texts have up to \d+ tokens"):
        run(settings.changed({"pad_to": [2, 3]}), str(undropped), tmp_path / "short")


def test_the_last_step_is_logged(language_model: str, data: dict[str, str], tmp_path: Path) -> None:
    log, said = run(settings_of(data=[data["boxes"]], max_steps=7), language_model, tmp_path / "run", log_steps=5)
    assert [entry["step"] for entry in log["history"]] == [1, 5, 7]
    first, last = log["history"][0]["loss"], log["history"][-1]["loss"]
    assert f"loss     {first:.4f} -> {last:.4f} in 7 steps" in said


@pytest.mark.parametrize(("replayed", "more"), [(3, "; --pad-to makes shapes few"), (30, "")])
def test_replays_are_told(replayed: int, more: str) -> None:
    said: list[str] = []
    graphs = {"replayed": replayed, "steps": 40, "graphs": 1, "shapes": 2}
    log = {"history": [], "seconds": 1.0, "ms_per_step": 1.0, "adapter_bytes": 1, "step_graphs": graphs}
    say_training(log, Throughput(), Path("run"), said.append)
    (line,) = [line for line in said if line.startswith("graphs ")]
    assert line == (
        f"graphs   {replayed} of 40 forward and backward passes were replayed, 1 graphs for 2 shapes of batches{more}"
    )


def test_held_out_rows() -> None:
    numbers = list(range(20))
    assert hold_out_rows(numbers, "none", 1) == (numbers, [])
    assert hold_out_rows(numbers, "last:5", 1) == (numbers[:15], numbers[15:])
    for how, count in (("count:4", 4), ("share:0.25", 5)):
        kept, held = hold_out_rows(numbers, how, 1)
        assert sorted(kept + held) == numbers
        assert kept == sorted(kept)
        assert len(held) == count
        assert hold_out_rows(numbers, how, 1) == (kept, held) != hold_out_rows(numbers, how, 2)


def test_names_of_sources(tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    path = tmp_path / "boolq" / "test.jsonl.gz"
    path.touch()
    assert source_names([str(path), "nyu-mll/glue:cola", "openai/gsm8k"]) == ["boolq", "cola", "gsm8k"]
    assert source_names([str(path), str(path)]) == [str(path), str(path)]
    others = [str(tmp_path / one / "boolq" / "test.json") for one in ("a", "b")]
    assert source_names([*others, "openai/gsm8k"]) == ["a/boolq/test.json", "b/boolq/test.json", "gsm8k"]
    assert source_names(["nyu-mll/glue:main", "openai/gsm8k:main"]) == ["nyu-mll/glue:main", "openai/gsm8k:main"]
