"""The orthonormality error in the logs, the report of a run and the adapter card."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments

from reft_kernels import ReftConfig, ReftModel, get_reft_model
from reft_kernels.training import ReftTrainerForCausalLM, make_supervised_data_module
from reft_kernels.training.card import MARK, write_card
from reft_kernels.training.orthonormality import Orthonormality, orthonormality_error
from reft_kernels.training.report import read_run, write_report
from reft_kernels.training.report_page import last_values, text_of
from reft_kernels.training.report_picture import draw, panels_of


def edited(model: Any, **options: Any) -> ReftModel:
    settings = {"method": "loreft", "layers": "all", "rank": 3, "positions": "f2+l2", **options}
    return get_reft_model(model, ReftConfig(**settings))


def test_the_error_is_that_of_the_worst_r() -> None:
    reft_model = edited(tiny_model("llama"), orthogonality="none")
    first = orthonormality_error(reft_model)
    assert first is not None
    assert first < 1e-6
    module = list(reft_model.interventions.values())[1]
    with torch.no_grad():
        module.rotate_layer.rows.R[2] *= 3
    assert float(orthonormality_error(reft_model)) == pytest.approx(8, rel=1e-5)
    assert orthonormality_error(edited(tiny_model("llama"), method="nodireft")) is None


@pytest.mark.parametrize("orthogonality", ["householder", "polar"])
def test_watching_the_error_changes_no_training(tmp_path: Path, orthogonality: str) -> None:
    losses = []
    for watched in (False, True):
        torch.manual_seed(3)
        reft_model = edited(make_llama(), orthogonality=orthogonality)
        made = rows(16)
        data = make_supervised_data_module(
            make_tokenizer(), reft_model, [row["instruction"] for row in made], [row["output"] for row in made]
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
            disable_tqdm=True, learning_rate=0.05, save_strategy="no",
        )  # fmt: skip
        trainer = ReftTrainerForCausalLM(reft_model, arguments, callbacks=[Orthonormality()] if watched else [], **data)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses.append([entry["loss"] for entry in logged])
        assert [entry.get("orthonormality_error", 1.0) < 1e-5 for entry in logged] == [watched] * 4
    assert losses[0] == losses[1]


def history(steps: int) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        entries.append(
            {"loss": 2 / step, "orthonormality_error": 1e-7 * step, "step_ms": 10.0, "mfu": 0.3, "step": step,
             "tokens_per_second": 90.0, "padded_tokens_per_second": 100.0, "learning_rate": 0.1}
        )  # fmt: skip
    entries.append(
        {"eval_loss": 1.5, "eval_accuracy": 0.5, "eval_perplexity": 30.0, "eval_runtime": 1.0, "step": steps}
    )
    return entries


def test_panels_are_of_what_the_history_has() -> None:
    panels = panels_of(history(5))
    assert [panel.title for panel in panels] == [
        "Loss", "Metrics on held-out data", "Perplexity on held-out data", "Orthonormality of R", "Step time", "Tokens",
        "Model FLOP utilisation",
    ]  # fmt: skip
    assert panels[0].curves[0] == ("training", [1, 2, 3, 4, 5], [2 / step for step in range(1, 6)])
    assert panels[0].curves[1] == ("held out", [5], [1.5])
    assert panels[-1].curves[0].values == pytest.approx([30.0] * 5)
    (loss,) = panels_of([{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 1}])
    assert loss.curves[0].values == [1.0]  # of a step that was done again the last value counts
    assert last_values(history(5)) == {
        "training loss (last)": 0.4, "held-out loss": 1.5, "accuracy": 0.5, "perplexity": 30.0
    }  # fmt: skip


def test_the_picture_shows_every_panel() -> None:
    pytest.importorskip("matplotlib")
    for steps in (1, 200):
        picture = draw(history(steps))
        assert picture is not None
        assert picture.startswith(b"\x89PNG")
    flat = [{"loss": 0.0, "orthonormality_error": 0.0, "step_ms": 0.0, "step": step} for step in (1, 2)]
    assert draw(flat)
    lost = [{"loss": math.nan, "step": 1}, {"loss": math.inf, "step": 2}]
    assert draw(lost)
    with pytest.raises(ValueError, match="no values over steps"):
        draw([{"step": 3}])


class Page(HTMLParser):
    """Tags, sources and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_values_are_readable() -> None:
    values = (None, True, 8, 134515008, 36771.2, 0.00012345, 0.5, [1, "ü"], "text", math.nan, math.inf)
    assert [text_of(value) for value in values] == [
        "–", "yes", "8", "134,515,008", "36,771", "0.0001234", "0.5", '[1, "ü"]', "text", "nan", "inf",
    ]  # fmt: skip


def test_the_page_is_one_file_with_escaped_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nasty = "<script>alert('x')</script> & |"
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    written = write_report(
        tmp_path,
        title=nasty,
        history=history(4),
        settings={nasty: nasty, "rank": 8},
        facts={"versions": {"torch": "2"}},
    )
    assert [path.name for path in written] == ["report.html", "report.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.png", "notes.txt"}
    page = Page(written[0].read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(nasty) == 4  # title, heading, name and value
    assert len(page.loaded) == 1
    assert page.loaded[0].startswith("data:image/png;base64,")
    for text in ("versions, torch", "accuracy", "0.5", "rank"):
        assert text in page.text


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no history"):
        write_report(tmp_path)
    log = {"settings": {"rank": 8}, "history": history(3)[:3], "device": "cpu"}
    (tmp_path / "train_log.json").write_text(json.dumps(log), encoding="utf-8")
    assert read_run(tmp_path) == history(3)[:3]
    for name, steps in (("checkpoint-2", 2), ("checkpoint-3", 3)):
        (tmp_path / name).mkdir()
        state = {"log_history": history(steps)}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert read_run(tmp_path) == history(3)
    page = Page(write_report(tmp_path)[0].read_text(encoding="utf-8"))
    assert "rank" in page.text
    assert "device" in page.text
    (tmp_path / "train_log.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train_log.json: not valid JSON"):
        write_report(tmp_path)


def front_matter(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    _, matter, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_card_says_what_the_adapter_is(tmp_path: Path) -> None:
    reft_model = edited(tiny_model("llama"))
    path = write_card(
        tmp_path, reft_model, base_model="owner/tiny-llama", recipe="commonsense", tags=["a: b", 'quote "\\\u2028'],
        data={"train": "owner/rows:main", "examples": 1200}, settings={"lr": 9e-4, "template": "%s\n"},
        metrics={"accuracy": 0.71},
    )  # fmt: skip
    assert path == tmp_path / "README.md"
    matter, body = front_matter(path)
    assert matter == {
        "library_name": "reft_kernels", "base_model": "owner/tiny-llama", "datasets": ["owner/rows"],
        "pipeline_tag": "text-generation", "tags": ["reft", "loreft", "reft_kernels", "a: b", 'quote "\\\u2028'],
    }  # fmt: skip
    trained = sum(p.numel() for p in reft_model.parameters() if p.requires_grad)
    for text in (
        "| recipe | commonsense |", "| rank | 3 |", "| layers | 0-2 |", "| accuracy | 0.71 |", "| lr | 0.0009 |",
        "| template | %s⏎ |", "LlamaForCausalLM.from_pretrained('owner/tiny-llama')", f"{trained:,} of",
        "| examples | 1200 |", "| reft\\_kernels |",
    ):  # fmt: skip
        assert text in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_card_of_local_models_names_no_repositories(tmp_path: Path) -> None:
    nasty = "`<b>|*x*"
    folder = tmp_path / nasty
    folder.mkdir()
    path = write_card(folder, edited(tiny_model("bert")), base_model=str(folder), data="rows.jsonl")
    assert path is not None
    matter, body = front_matter(path)
    assert matter == {"library_name": "reft_kernels", "tags": ["reft", "loreft", "reft_kernels"]}
    assert "<b>" not in body.replace(f"from_pretrained({nasty!r})".replace("`", "\\x60"), "")
    assert "\n# \\`&lt;b&gt;|\\*x\\*\n" in body
    assert str(tmp_path) not in body


def test_the_card_of_somebody_else_stays(tmp_path: Path) -> None:
    reft_model = edited(tiny_model("llama"))
    card = tmp_path / "README.md"
    assert write_card(tmp_path, reft_model, base_model="a/b") == card
    assert write_card(tmp_path, reft_model, base_model="a/c") == card
    assert "a/c" in card.read_text(encoding="utf-8")
    own = card.read_text(encoding="utf-8").replace(MARK + "\n", "")
    card.write_text(own, encoding="utf-8")
    assert write_card(tmp_path, reft_model, base_model="a/d") is None
    assert card.read_text(encoding="utf-8") == own
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
