"""state_dict and load_state_dict of a whole ReftModel and of its parts, averages of weights, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hand_edits import strengthen
from tiny_models import random_batch, tiny_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reft_kernels.config import ReftConfig
from reft_kernels.model import ReftModel, get_reft_model

METHODS = ("loreft", "noreft", "consreft", "nodireft")


def make(seed: int = 0, **settings: Any) -> ReftModel:
    torch.manual_seed(seed)
    defaults = {"method": "loreft", "layers": "all", "rank": 2, "positions": "f2+l2", "tied": False}
    reft_model = get_reft_model(tiny_model("llama", seed=seed), ReftConfig(**{**defaults, **settings}))
    strengthen(reft_model.interventions)
    return reft_model.eval()


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    batch = random_batch(lengths)
    return {**batch, "labels": batch["input_ids"]}


def train(reft_model: ReftModel, batch: dict[str, Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        reft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Wrapper(nn.Module):
    """As DistributedDataParallel and many trainers have it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("orthogonality", ["householder", "polar", "none"])
def test_the_state_is_the_model(orthogonality: str) -> None:
    reft_model, other = make(orthogonality=orthogonality), make(seed=1, orthogonality=orthogonality)
    batch = batch_of([6, 4])
    train(reft_model, batch)
    wanted = reft_model(**batch).logits
    assert not other(**batch).logits.equal(wanted)
    state = reft_model.state_dict()
    assert {name.split(".")[0] for name in state} == {"model", "interventions"}
    result = other.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other(**batch).logits.equal(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_the_state(method: str) -> None:
    reft_model, other = make(method=method), make(seed=1, method=method)
    batch = batch_of([6, 4])
    wanted = reft_model(**batch).logits
    base = {name: value for name, value in reft_model.state_dict().items() if name.startswith("model.")}
    assert {name.removeprefix("model.") for name in base} == set(reft_model.model.state_dict())
    other.model.load_state_dict(reft_model.model.state_dict())
    other.interventions.load_state_dict(reft_model.interventions.state_dict())
    assert other(**batch).logits.equal(wanted)


def test_prefixes_and_what_does_not_fit() -> None:
    reft_model, other = make(), make(seed=1)
    state = Wrapper(reft_model).state_dict()
    assert all(name.startswith("module.") for name in state)
    Wrapper(other).load_state_dict(state)
    batch = batch_of([6, 4])
    assert other(**batch).logits.equal(reft_model(**batch).logits)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    make(seed=2).load_state_dict(state)
    key = next(name for name in state if name.startswith("interventions."))
    missing = {name: value for name, value in state.items() if name != key}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing)
    assert other.load_state_dict(missing, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "interventions.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(rank=3).load_state_dict(state)


def test_a_training_that_goes_on_from_its_state() -> None:
    batch = batch_of([6, 4])

    def optimizer_of(reft_model: ReftModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=0.02)

    def step(reft_model: ReftModel, optimizer: torch.optim.Optimizer) -> float:
        loss = reft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    reft_model = make()
    optimizer = optimizer_of(reft_model)
    step(reft_model, optimizer)
    saved = copy.deepcopy((reft_model.state_dict(), optimizer.state_dict()))
    wanted = [step(reft_model, optimizer) for _ in range(3)]
    other = make(seed=1)
    other.load_state_dict(saved[0])
    optimizer = optimizer_of(other)
    optimizer.load_state_dict(saved[1])
    assert [step(other, optimizer) for _ in range(3)] == wanted


@pytest.mark.parametrize("what", ["model", "interventions"])
def test_averages_of_weights(what: str) -> None:
    """AveragedModel copies what it is given: of a whole model the copy has hooks of its own and is called as one."""
    reft_model = make()
    batch = batch_of([6, 4])
    decay = 0.5
    source = reft_model if what == "model" else reft_model.interventions
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(decay))
    start = reft_model(**batch).logits
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        train(reft_model, batch, 1)
        average.update_parameters(source)
        for name, p in source.named_parameters():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()
            else:
                expected[name] = p.detach().clone()
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, expected[name], msg=name)
    trained = reft_model(**batch).logits
    if what == "model":
        averaged = average(**batch).logits
        assert not averaged.equal(trained)
        assert not averaged.equal(start)
        other = make()
        other.interventions.load_state_dict(average.module.interventions.state_dict())
        assert other(**batch).logits.equal(averaged)
        assert reft_model(**batch).logits.equal(trained)
    else:
        reft_model.interventions.load_state_dict(average.module.state_dict())
        assert not reft_model(**batch).logits.equal(trained)


@pytest.mark.parametrize("orthogonality", ["householder", "polar", "none"])
def test_copies_train_by_themselves(orthogonality: str) -> None:
    reft_model = make(orthogonality=orthogonality)
    batch = batch_of([6, 4])
    before = reft_model(**batch).logits
    copied = copy.deepcopy(reft_model)
    plain = reft_model.model(**batch).logits
    assert copied(**batch).logits.equal(before)
    train(copied, batch)
    changed = copied(**batch).logits
    assert not changed.equal(before)
    assert reft_model(**batch).logits.equal(before)
    copied.remove_hooks()
    assert copied(**batch).logits.equal(plain)
    assert reft_model(**batch).logits.equal(before)
    copied = copy.deepcopy(reft_model)
    reft_model.remove_hooks()
    assert reft_model(**batch).logits.equal(plain)
    assert copied(**batch).logits.equal(before)
    prompt = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    found = copied.generate(
        **prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(found.logits[0], before[:1, -1], rtol=1e-4, atol=1e-4)
