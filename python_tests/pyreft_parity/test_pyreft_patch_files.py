"""Files and trainers of an installed pyreft under patch_pyreft()."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyreft
import pytest
import pyvene
import torch
import transformers
from peer import CLASSES, CONSTRAINED, WITH_PROJ, WITH_W, assert_equal_within, representations, settings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainingArguments

import reft_kernels
from reft_kernels import patch_pyreft, unpatch_pyreft
from reft_kernels.pyreft_layout import read_operands

LAYERS, WIDTH, RANK = (0, 2), 32, 3
OLD_TRAINER = int(transformers.__version__.split(".")[0]) < 5
WHERE = {"sources->base": (None, [[[0, 4], [1, 2]], [[3, 5], [2, 6]]])}


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch_pyreft()
    yield
    unpatch_pyreft()


def llama(kind: Any = LlamaForCausalLM, **changes: Any) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    return kind(config).eval()


def model_of(name: str, component: str = "block_output", base: Any = None, **others: Any) -> Any:
    if name in WITH_PROJ:
        others.setdefault("add_bias", True)
    modules = [getattr(pyreft, name)(**settings(name, WIDTH, RANK, **others)) for _ in LAYERS]
    entries = [{**entry, "component": component} for entry in representations(LAYERS, modules, RANK)]
    if "." in component:
        entries = entries[:1]
    return pyreft.get_reft_model(llama() if base is None else base, pyreft.ReftConfig(representations=entries))


def where_of(model: Any) -> dict[str, Any]:
    return {"sources->base": (None, WHERE["sources->base"][1][: len(model.interventions)])}


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 8))}


@torch.no_grad()
def logits(model: Any, base: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(base, unit_locations=where_of(model))[1].logits


@pytest.mark.parametrize("name", CLASSES)
def test_save_and_load_keep_everything(name: str, tmp_path: Path) -> None:
    act_fn = "relu" if name in WITH_W else None
    model = model_of(name, act_fn=act_fn, dropout=0.25)
    model.eval()
    model.save(str(tmp_path / "saved"))
    again = pyreft.ReftModel.load(str(tmp_path / "saved"), llama())
    assert type(again) is pyreft.ReftModel
    again.eval()
    base = inputs()
    assert_equal_within(logits(again, base), logits(model, base), 5e-6, "logits")
    for mine, theirs in zip(again.interventions.values(), model.interventions.values(), strict=True):
        assert type(mine) is type(theirs)
        assert [p.dtype for p in mine.parameters()] == [p.dtype for p in theirs.parameters()]
        if hasattr(theirs, "dropout"):
            assert mine.dropout.p == 0.25
    ours = reft_kernels.ReftModel.load(tmp_path / "saved", llama())
    assert_equal_within(logits(ours, base), logits(model, base), 5e-6, "logits")


@pytest.mark.parametrize("name", CONSTRAINED)
def test_stock_pyreft_reads_what_was_saved_under_the_patch(name: str, tmp_path: Path) -> None:
    model = model_of(name, dtype=torch.bfloat16, base=llama().to(torch.bfloat16))
    model.eval()
    model.save(str(tmp_path / "saved"))
    base = inputs()
    expected = logits(model, base)
    unpatch_pyreft()
    stock = pyreft.ReftModel.load(str(tmp_path / "saved"), llama().to(torch.bfloat16))
    assert_equal_within(logits(stock, base).float(), expected.float(), 2e-2, "logits")
    for mine, theirs in zip(model.interventions.values(), stock.interventions.values(), strict=True):
        assert torch.allclose(mine.rotate_layer.weight, theirs.rotate_layer.weight, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_of_stock_pyreft(name: str) -> None:
    """Stock's into a patched one, and back; and inside of a model nn.Module's own."""
    others: dict[str, Any] = {"add_bias": True} if name in WITH_PROJ else {}
    under_patch = getattr(pyreft, name)(**settings(name, WIDTH, RANK, **others))
    written = under_patch.state_dict()
    unpatch_pyreft()
    stock = getattr(pyreft, name)(**settings(name, WIDTH, RANK, **others))
    state = copy.deepcopy(stock.state_dict())
    h = torch.randn(2, 3, WIDTH)
    expected = stock(h)
    stock.load_state_dict(written)
    back = stock(h)
    patch_pyreft()
    assert_equal_within(back, under_patch(h), 5e-6, name)
    under_patch.load_state_dict(state)
    assert_equal_within(under_patch(h), expected, 5e-6, name)
    outer = nn.ModuleDict({"one": under_patch})
    keys = set(outer.state_dict())
    assert all(key.startswith("one.") for key in keys)
    assert {f"one.{key}" for key, _ in under_patch.named_parameters()} <= keys
    other = nn.ModuleDict({"one": getattr(pyreft, name)(**settings(name, WIDTH, RANK, **others))})
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other["one"](h), under_patch(h))
    with pytest.raises(ValueError, match=r"must be \[3, 32\]|must be \[3\]"):
        under_patch.load_state_dict({key: _wider(value) for key, value in state.items()})


def _wider(value: torch.Tensor) -> torch.Tensor:
    """The same of rank 4."""
    if value.dim() == 0 or value.shape == (WIDTH, WIDTH):
        return value
    axis = value.shape.index(RANK)
    return torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)


def test_a_module_path_and_the_names_of_older_pyvene(tmp_path: Path) -> None:
    model = model_of("LoreftIntervention", component="model.layers[1].mlp.output")
    model.eval()
    model.save(str(tmp_path / "saved"))
    base = inputs()
    for path in (tmp_path / "saved").glob("intkey_*"):
        path.rename(path.with_name("intkey_comp.model.layers[1].mlp.output.unit.pos.nunit.1#0.bin"))
    again = pyreft.ReftModel.load(str(tmp_path / "saved"), llama())
    assert_equal_within(logits(again, base), logits(model, base), 5e-6, "logits")


def test_load_intervention_on_a_cpu(tmp_path: Path) -> None:
    model, other = model_of("LoreftIntervention"), model_of("LoreftIntervention")
    before = [id(p) for p in other.get_trainable_parameters()]
    model.save_intervention(str(tmp_path / "saved"), include_model=False)
    other.load_intervention(str(tmp_path / "saved"), include_model=False)
    base = inputs()
    assert_equal_within(logits(other, base), logits(model, base), 5e-6, "logits")
    assert [id(p) for p in other.get_trainable_parameters()] == before


def test_own_classes_are_left_to_pyreft(tmp_path: Path) -> None:
    class Own(pyreft.LoreftIntervention):
        """A class that no file can name."""

    modules = [Own(**settings("LoreftIntervention", WIDTH, RANK)) for _ in LAYERS]
    model = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=representations(LAYERS, modules, RANK)))
    model.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "reft_kernels.json").exists()
    assert "Own" in json.loads((tmp_path / "saved" / "config.json").read_text())["intervention_types"][0]


def test_other_parts_are_saved_by_pyreft(tmp_path: Path) -> None:
    """A learned_source of two layers has no place in a sidecar; its weights are those of stock's state dict."""
    modules = [pyreft.LoreftIntervention(**settings("LoreftIntervention", WIDTH, RANK)) for _ in LAYERS]
    for module in modules:
        module.learned_source = nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, RANK))
    model = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=representations(LAYERS, modules, RANK)))
    model.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "reft_kernels.json").exists()
    state = modules[0].state_dict()
    assert {"0.weight", "1.weight", "rotate_layer"} <= set(state)
    unpatch_pyreft()
    expected = modules[0].state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_learned_source_without_a_bias_is_saved() -> None:
    module = pyreft.LoreftIntervention(**settings("LoreftIntervention", WIDTH, RANK))
    module.learned_source = nn.Linear(WIDTH, RANK, bias=False)
    assert set(module.state_dict()) == {"weight", "rotate_layer"}


# Our form of R in files of stock pyvene


@pytest.mark.parametrize("name", CONSTRAINED)
def test_our_model_reads_what_was_saved_after_the_patch(name: str, tmp_path: Path) -> None:
    """Stock's state dict of them has our rows in it."""
    model = model_of(name)
    with torch.no_grad():
        for module in model.interventions.values():
            module.rotate_layer.rows.X.add_(torch.randn_like(module.rotate_layer.rows.X).tril(-1), alpha=0.3)
    unpatch_pyreft()
    model.save(str(tmp_path / "saved"))
    again = reft_kernels.ReftModel.load(tmp_path / "saved", llama())
    for ours, theirs in zip(again.interventions.values(), model.interventions.values(), strict=True):
        if name == "LoreftIntervention":  # by its own state dict, which has R alone
            assert torch.allclose(ours.rotate_layer.weight, theirs.rotate_layer.weight, atol=1e-6)
        else:
            assert torch.equal(ours.rotate_layer.rows.X, theirs.rotate_layer.rows.X)
            assert torch.equal(ours.rotate_layer.weight, theirs.rotate_layer.weight)
    base = inputs()
    assert_equal_within(logits(again, base), logits(model, base), 5e-6, "logits")
    polar = reft_kernels.ReftModel.load(tmp_path / "saved", llama(), orthogonality="polar")
    assert_equal_within(logits(polar, base), logits(model, base), 5e-6, "logits")


def test_the_patch_reads_them_too(tmp_path: Path) -> None:
    model = model_of("DireftIntervention")
    base = inputs()
    expected = logits(model, base)
    unpatch_pyreft()
    model.save(str(tmp_path / "saved"))
    made_before = model_of("DireftIntervention")
    patch_pyreft()
    again = pyreft.ReftModel.load(str(tmp_path / "saved"), llama())
    assert_equal_within(logits(again, base), expected, 5e-6, "logits")
    made_before.load_intervention(str(tmp_path / "saved"), include_model=False)
    assert_equal_within(logits(made_before, base), expected, 5e-6, "logits")


@pytest.mark.parametrize("orthogonality", ["householder", "polar", "none"])
def test_our_interventions_saved_by_stock_pyvene(orthogonality: str, tmp_path: Path) -> None:
    unpatch_pyreft()
    keywords = settings("DireftIntervention", WIDTH, RANK, act_fn="relu")
    modules = [reft_kernels.DireftIntervention(**keywords, orthogonality=orthogonality) for _ in LAYERS]
    model = pyvene.IntervenableModel(representations(LAYERS, modules, RANK), llama())
    model.save(str(tmp_path / "saved"))
    base = inputs()
    options = {"act_fn": "relu", "orthogonality": orthogonality}
    again = reft_kernels.ReftModel.load(tmp_path / "saved", llama(), **options)
    assert_equal_within(logits(again, base), logits(model, base), 5e-6, "logits")
    for ours, theirs in zip(again.interventions.values(), modules, strict=True):
        assert torch.allclose(ours.rotate_layer.weight, theirs.rotate_layer.weight, atol=1e-6)
    other = reft_kernels.ReftModel.load(tmp_path / "saved", llama(), act_fn="relu")
    assert_equal_within(logits(other, base), logits(model, base), 5e-6, "logits")


def test_the_rows_of_a_state_dict() -> None:
    module = reft_kernels.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=RANK)
    with torch.no_grad():
        module.rotate_layer.rows.X.add_(torch.randn(WIDTH, RANK).tril(-1))
    state = module.state_dict()
    found = read_operands(state)
    assert found.R.dtype == torch.float64
    assert torch.allclose(found.R.float(), module.rotate_layer.rows.weight, atol=1e-6)
    assert torch.equal(found.W, module.learned_source.weight)
    with pytest.raises(ValueError, match=r"X is there without rotate_layer\.rows\.signs"):
        read_operands({key: value for key, value in state.items() if not key.endswith("signs")})
    with pytest.raises(ValueError, match=r"expected X \[d, r\], reflectors"):
        read_operands({**state, "rotate_layer.rows.signs": torch.ones(RANK + 1)})
    with pytest.raises(ValueError, match="one operand is there twice"):
        read_operands({**state, "rotate_layer": torch.eye(WIDTH, RANK)})


# The base model's parameters, and the sidecar


def with_trained_base() -> Any:
    model = model_of("LoreftIntervention")
    for name, parameter in model.model.named_parameters():
        if "o_proj" in name:
            parameter.requires_grad_()
            with torch.no_grad():
                parameter.mul_(1.5)
    return model


def test_the_base_models_parameters_are_loaded(tmp_path: Path) -> None:
    model = with_trained_base()
    model.save(str(tmp_path / "saved"), include_model=True)
    base = inputs()
    expected = logits(model, base)
    again = pyreft.ReftModel.load(str(tmp_path / "saved"), llama(), include_model=True)
    assert_equal_within(logits(again, base), expected, 5e-6, "logits")
    other = model_of("LoreftIntervention")
    other.load_intervention(str(tmp_path / "saved"))
    assert_equal_within(logits(other, base), expected, 5e-6, "logits")
    without = pyreft.ReftModel.load(str(tmp_path / "saved"), llama())
    assert not torch.allclose(logits(without, base), expected, atol=1e-3)


def test_base_parameters_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    model = with_trained_base()
    model.save(str(folder))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is missing"):
        pyreft.ReftModel.load(str(folder), llama(), include_model=True)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is missing"):
        model.load_intervention(str(folder))
    model_of("LoreftIntervention").load_intervention(str(folder))  # whose base is not trained
    for tensors, message in (
        ({"model.layers.9.weight": torch.ones(1)}, "has no parameter model.layers.9.weight"),
        ({"lm_head.weight": torch.ones(3, 3)}, r"lm_head.weight must be \[64, 32\], got \[3, 3\]"),
    ):
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            pyreft.ReftModel.load(str(folder), llama(), include_model=True)
        with pytest.raises(ValueError, match=message):
            model.load_intervention(str(folder))


def test_a_sidecar_of_what_was_there_before_is_removed(tmp_path: Path) -> None:
    class Own(pyreft.LoreftIntervention):
        """A class that no file can name."""

    folder = tmp_path / "saved"
    model_of("LoreftIntervention").save(str(folder))
    assert (folder / "reft_kernels.json").exists()
    modules = [Own(**settings("LoreftIntervention", WIDTH, RANK)) for _ in LAYERS]
    own = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=representations(LAYERS, modules, RANK)))
    own.save(str(folder))
    assert not (folder / "reft_kernels.json").exists()


def test_the_sidecar_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str) -> None:
            assert name == "me/adapter"

        def upload_file(self, **file: Any) -> None:
            uploaded.append(file)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = model_of("LoreftIntervention")
    model.save(str(tmp_path / "here"), save_to_hf_hub=False)
    assert not uploaded
    model.save(str(tmp_path / "saved"), save_to_hf_hub=True, hf_repo_name="me/adapter")
    names = [Path(file["path_or_fileobj"]).name for file in uploaded]
    assert names == [file["path_in_repo"] for file in uploaded]
    assert set(names) == {path.name for path in (tmp_path / "saved").iterdir()}
    assert {file["repo_id"] for file in uploaded} == {"me/adapter"}


# Trainers


class _Rows(torch.utils.data.Dataset):
    def __init__(self, labels: int | None = None, count: int = 8) -> None:
        torch.manual_seed(1)
        self.ids = torch.randint(3, 64, (count, 8))
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels = ids if self.labels is None else ids[0] % self.labels
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "intervention_locations": torch.tensor([[0, 7], [1, 6]]),
        }  # fmt: skip


def arguments(folder: Path, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, save_strategy="epoch", logging_steps=1, **others,
    )  # fmt: skip


def test_the_trainer_trains_evaluates_and_saves(tmp_path: Path) -> None:
    model = model_of("LoreftIntervention")
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, args=arguments(tmp_path, num_train_epochs=2), train_dataset=_Rows(), eval_dataset=_Rows(count=4)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    folder = tmp_path / "checkpoint-2" / "intervenable_model"
    again = pyreft.ReftModel.load(str(folder), llama(), include_model=True)
    base = inputs()
    model.save(str(tmp_path / "final"))
    assert (logits(again, base) - logits(model, base)).abs().max() > 1e-3
    last = pyreft.ReftModel.load(str(tmp_path / "checkpoint-4" / "intervenable_model"), llama())
    assert_equal_within(logits(last, base), logits(model, base), 5e-6, "logits")
    ours = reft_kernels.ReftModel.load(tmp_path / "checkpoint-4" / "intervenable_model", llama())
    assert_equal_within(logits(ours, base), logits(model, base), 5e-6, "logits")
    # A second run into the same folder replaces the checkpoint; stock leaves the stale one.
    trainer.save_model(str(tmp_path / "checkpoint-2"))
    replaced = pyreft.ReftModel.load(str(folder), llama())
    assert_equal_within(logits(replaced, base), logits(model, base), 5e-6, "logits")


@pytest.mark.skipif(OLD_TRAINER, reason="that Trainer cannot read its own random states with torch 2.6 and newer")
def test_the_trainer_resumes(tmp_path: Path) -> None:
    whole = pyreft.ReftTrainerForCausalLM(
        model=model_of("LoreftIntervention"), args=arguments(tmp_path, num_train_epochs=2), train_dataset=_Rows()
    )
    whole.train()
    fresh = model_of("LoreftIntervention")
    resumed = pyreft.ReftTrainerForCausalLM(
        model=fresh, args=arguments(tmp_path / "resumed", num_train_epochs=2), train_dataset=_Rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    # Near, not equal: pyreft's files hold R and not the base that Adam's moments of X belong to.
    base = inputs()
    assert_equal_within(logits(resumed.model, base), logits(whole.model, base), 2e-2, "logits")
    first = pyreft.ReftModel.load(str(tmp_path / "checkpoint-2" / "intervenable_model"), llama())
    assert (logits(first, base) - logits(whole.model, base)).abs().max() > 0.2


class _Wrapped(nn.Module):
    """Hands everything on, as PEFT's model does without a task_type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.seen: set[str] = set()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen |= set(kwargs)
        return self.inner(*args, **kwargs)


class _WrappedPeft(_Wrapped):
    def get_base_model(self) -> nn.Module:
        return self.inner


@pytest.mark.parametrize("wrapper", [_Wrapped, _WrappedPeft])
def test_a_base_model_that_hands_its_arguments_on(wrapper: type[_Wrapped], tmp_path: Path) -> None:
    class Rows(_Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {**super().__getitem__(index), "id": torch.tensor(index)}

    model = model_of("LoreftIntervention", component="inner.model.layers[1].output", base=wrapper(llama()))
    rows = Rows()

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found = torch.utils.data.default_collate(batch)
        return {**found, "intervention_locations": found["intervention_locations"][:, :1]}

    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows, data_collator=collate
    )
    trainer.train()
    assert model.model.seen == {"input_ids", "attention_mask", "labels"}
    outputs = trainer.compute_loss(model, collate([rows[0], rows[1]]), return_outputs=True)[1]
    assert outputs.logits.shape == (2, 8, 64)


def test_extra_columns_do_not_reach_the_base_model(tmp_path: Path) -> None:
    """Where it says what it takes, and where the model that it hands on to does."""
    batch = torch.utils.data.default_collate([_Rows()[0], _Rows()[1]])
    batch = {**batch, "extra": torch.ones(2), "intervention_locations": batch["intervention_locations"][:, :1]}
    for base, component in (
        (llama(), "model.layers[1].output"),
        (_WrappedPeft(llama()), "inner.model.layers[1].output"),
    ):
        model = model_of("LoreftIntervention", component=component, base=base)
        trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments(tmp_path))
        names: list[str] = []
        base.register_forward_pre_hook(lambda _, args, kwargs, names=names: names.extend(kwargs), with_kwargs=True)
        trainer.compute_loss(model, batch)
        assert set(names) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.skipif(OLD_TRAINER, reason="the older Trainer takes tokenizer=")
def test_a_tokenizer_reaches_the_trainer(tmp_path: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="[PAD]")
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model_of("LoreftIntervention"), args=arguments(tmp_path), tokenizer=tokenizer, train_dataset=_Rows()
    )
    assert trainer.processing_class is tokenizer


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))


@pytest.mark.parametrize("labels", [1, 3])
def test_sequence_classification(labels: int, tmp_path: Path) -> None:
    base = llama(LlamaForSequenceClassification, num_labels=labels)
    model = model_of("LoreftIntervention", base=base)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"error": float((prediction.predictions.argmax(-1) != prediction.label_ids).float().mean())}

    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model, args=arguments(tmp_path, num_train_epochs=1, eval_strategy="epoch"),
        train_dataset=_Rows(labels), eval_dataset=_Rows(labels, count=6), compute_metrics=metrics,
    )  # fmt: skip
    trainer.train()
    assert any("eval_error" in entry for entry in trainer.state.log_history)
    assert seen[-1].predictions.shape == (6, labels)
    assert seen[-1].predictions.dtype == torch.float32


def test_subspaces_reach_an_own_class(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Own(pyreft.LoreftIntervention):
        def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
            seen.append(subspaces)
            return super().forward(base)

    modules = [Own(**settings("LoreftIntervention", WIDTH, RANK)) for _ in LAYERS]
    model = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=representations(LAYERS, modules, RANK)))
    trainer = pyreft.ReftTrainerForCausalLM(model=model, args=arguments(tmp_path))
    batch = torch.utils.data.default_collate([_Rows()[0], _Rows()[1]])
    subspaces = torch.tensor([[[0], [1]], [[2], [1]]])  # [batch, intervention, subspace]
    trainer.compute_loss(model, {**batch, "subspaces": subspaces})
    assert seen == [[[0], [2]], [[1], [1]]]
    seen.clear()
    trainer.compute_loss(model, batch)
    assert seen == [None, None]


def test_a_model_without_interventions_trains_its_base(tmp_path: Path) -> None:
    """A baseline that trains LoRA alone, on data sets that have locations all the same."""
    model = pyreft.get_reft_model(llama(), pyreft.ReftConfig(representations=[]))
    weight = model.model.lm_head.weight.requires_grad_()
    before = weight.detach().clone()
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, args=arguments(tmp_path, max_steps=2), train_dataset=_Rows(), eval_dataset=_Rows(count=4)
    )
    batch = torch.utils.data.default_collate([_Rows()[0], _Rows()[1]])
    expected = model.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert torch.equal(trainer.compute_loss(model, batch), expected)
    del batch["intervention_locations"]
    assert torch.equal(trainer.compute_loss(model, batch), expected)
    trainer.train()
    assert not torch.equal(weight, before)


def test_evaluation_leaves_the_modes(tmp_path: Path) -> None:
    base = llama(LlamaForSequenceClassification, num_labels=3)
    model = model_of("LoreftIntervention", base=base, dropout=0.5)
    training: list[bool] = []

    def metrics(_: Any) -> dict[str, float]:
        return {"seen": float(len(training))}

    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model, args=arguments(tmp_path), eval_dataset=_Rows(3, count=6), compute_metrics=metrics
    )
    model.train()
    first, second = model.interventions.values()
    second.eval()
    base.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    base.register_forward_hook(lambda module, *_: training.append(module.training or first.training))
    found = trainer.evaluate()
    assert found["eval_seen"] > 0
    assert not any(training)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert first.training
    assert not second.training
    assert len(modes) > 20


def test_only_one_process_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pyreft.ReftTrainerForCausalLM(model=model_of("LoreftIntervention"), args=arguments(tmp_path))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.save_model(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    trainer.save_model(str(tmp_path / "other"))
    assert (tmp_path / "other" / "intervenable_model" / "config.json").exists()
