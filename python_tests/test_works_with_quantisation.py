"""Interventions in quantised base models: trained, saved, loaded into a base quantised anew, generated with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hand_edits import edited_by_hand, ends, strengthen
from tiny_models import random_batch, tiny_model

from reft_kernels import as_pretrained_model
from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def bitsandbytes_base(folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = transformers.BitsAndBytesConfig(**settings)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def torchao_base(folder: Path, dtype: torch.dtype) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


BASES: dict[str, Any] = {
    "bitsandbytes 8 bits": lambda folder, dtype: bitsandbytes_base(folder, dtype, load_in_8bit=True),
    "bitsandbytes 4 bits": lambda folder, dtype: bitsandbytes_base(
        folder, dtype, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    ),
    "torchao int8": torchao_base,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_quantised_bases(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "base")
    model = BASES[name](tmp_path / "base", dtype).eval()
    projection = model.model.layers[0].mlp.down_proj
    assert type(projection) is not torch.nn.Linear or type(projection.weight) is not torch.nn.Parameter
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2, positions="f1+l1"))
    reft_model.set_device("cpu")  # moves nothing that is quantised
    strengthen(reft_model.interventions)
    batch = random_batch([6, 4])
    heads, tails = ends(batch["attention_mask"], 1, 1)
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    edits: Any = [(model.model.layers[i], "output", m, rows) for i, m in enumerate(reft_model.interventions.values())]
    with torch.no_grad():
        with edited_by_hand(edits):
            wanted = model(**batch).logits
        tolerance = 1e-3 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(reft_model(**batch).logits, wanted, rtol=tolerance, atol=tolerance)
    batch["labels"] = batch["input_ids"]
    reft_model.train()
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = reft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    reft_model.eval()
    reft_model.save(tmp_path / "adapter")
    loaded = ReftModel.load(tmp_path / "adapter", BASES[name](tmp_path / "base", dtype))
    prompt = random_batch([6, 4], side="left")
    options = {"max_new_tokens": 4, "do_sample": False}
    found = loaded.generate(**prompt, **options)
    assert found.equal(reft_model.generate(**prompt, **options))
    with torch.no_grad():
        assert loaded(**batch).loss.equal(reft_model(**batch).loss)
        assert not loaded(**batch).loss.equal(model(**batch).loss)


@pytest.mark.parametrize("name", BASES)
def test_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "base")
    model = BASES[name](tmp_path / "base", torch.float32)
    config = ReftConfig(method="loreft", layers="all", rank=2, component="mlp_output", rebuild=False)
    reft_model = get_reft_model(model, config).train()
    batch = random_batch([6, 4])
    batch["labels"] = batch["input_ids"]
    parameters = list(reft_model.interventions.parameters())
    wanted = torch.autograd.grad(reft_model(**batch, use_cache=False).loss, parameters)
    reft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(reft_model(**batch, use_cache=False).loss, parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_transformers_trainer(name: str, tmp_path: Path) -> None:
    """Which refuses quantised models without an adapter that it knows."""
    pytest.importorskip("accelerate")
    tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path / "base")
    reft_model = get_reft_model(
        BASES[name](tmp_path / "base", torch.float32), ReftConfig(method="loreft", layers="all", rank=2)
    )
    ids = torch.randint(3, 50, (6,))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.002, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    for model in (reft_model, as_pretrained_model(reft_model)):
        trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
