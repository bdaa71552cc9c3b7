"""Two processes train as one on the joint batch: DistributedDataParallel, FSDP2 and accelerate, checkpointed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import random_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    CASES,
    STEPS,
    WORLD,
    as_launched,
    assert_trained_alike,
    free_port,
    in_processes,
    joint_batch,
    make,
    share,
    train,
    whole,
)

from reft_kernels.model import ReftModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


def started(rank: int, rendezvous: str) -> Tensor:
    """This process's share of the joint batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    return share(rank)


def data_parallel(rank: int, rendezvous: str) -> None:
    mine = started(rank, rendezvous)
    for case in CASES:
        reft_model = make(**case)
        parallel = DistributedDataParallel(reft_model)
        losses = train(parallel, list(reft_model.interventions.parameters()), mine)
        assert_trained_alike(reft_model, losses, case)
        assert all(name.startswith("module.") for name in parallel.state_dict())


def test_data_parallel(tmp_path: Path) -> None:
    in_processes(data_parallel, str(tmp_path / "rendezvous"))


def fully_sharded(rank: int, rendezvous: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mine = started(rank, rendezvous)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for case in CASES:
        for interventions in ("sharded", "replicated"):
            reft_model = make(**case)
            for block in reft_model.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(reft_model.model, mesh=mesh)
            parameters = list(reft_model.interventions.parameters())
            sync = None
            if interventions == "sharded":
                fully_shard(reft_model, mesh=mesh)
                parameters = list(reft_model.interventions.parameters())
            else:

                def sync(parameters: list[nn.Parameter] = parameters) -> None:
                    for p in parameters:
                        assert p.grad is not None
                        dist.all_reduce(p.grad)
                        p.grad /= WORLD

            assert all(hasattr(p, "full_tensor") == (interventions == "sharded") for p in parameters)
            losses = train(reft_model, parameters, mine, sync)
            assert_trained_alike(reft_model, losses, {**case, "interventions": interventions})
            state = get_model_state_dict(reft_model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                loaded = make(case["component"])
                before = {name: p.clone() for name, p in loaded.interventions.named_parameters()}
                loaded.load_state_dict(state)
                assert not any(p.equal(before[name]) for name, p in loaded.interventions.named_parameters())
            dist.barrier()


def test_fully_sharded(tmp_path: Path) -> None:
    in_processes(fully_sharded, str(tmp_path / "rendezvous"))


def accelerated(rank: int, port: int, shard: bool) -> None:
    import accelerate

    as_launched(rank, port)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    if shard:  # which accelerate offers on accelerators alone
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.device_mesh = None
        accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
    reft_model = make()
    rows = [{"input_ids": ids, "labels": ids} for ids in joint_batch()]
    # Four batches of one row: of every two, one goes to each process, and two are accumulated.
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(reft_model, optimizer, loader)
    losses = []
    for _ in range(STEPS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, ReftModel)
    assert_trained_alike(unwrapped, torch.stack(losses).reshape(STEPS, 2).mean(1), {"component": "block_output"})
    state = {name: whole(value) for name, value in accelerator.get_state_dict(model).items()}
    if rank == 0:
        make().load_state_dict(state)


@pytest.mark.parametrize("shard", [False, True], ids=["data parallel", "fully sharded"])
def test_accelerate(shard: bool) -> None:
    pytest.importorskip("accelerate")
    in_processes(accelerated, free_port(), shard)


def test_accelerate_in_one_process() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    reft_model = make()
    batch = random_batch([6, 4])
    wanted = reft_model(**batch).logits
    model, _ = accelerator.prepare(reft_model, torch.optim.AdamW(reft_model.interventions.parameters()))
    assert model(**batch).logits.equal(wanted)
    assert accelerator.unwrap_model(model) is reft_model
