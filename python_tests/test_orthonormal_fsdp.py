"""R with orthonormal rows under FullyShardedDataParallel (FSDP2): two processes train as one, and no R is stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model
from two_processes import WORLD, in_processes

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.orthogonal import OrthonormalRows

pytestmark = pytest.mark.slow


def losses(shard: bool, rank: int) -> list[float]:
    """Of a few steps, then of a forward after the sharded X were written without any optimiser."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    reft_model = get_reft_model(tiny_model("llama"), ReftConfig(method="loreft", layers="all", rank=2))
    if shard:
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for block in reft_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(reft_model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in reft_model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 40, (2 * WORLD, 6), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * rank : 2 * rank + 2] if shard else ids
    found = []
    for _ in range(3):
        loss = reft_model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().clone())
    with torch.no_grad():
        for scale in (1.0, 30.0, -5.0):
            for module in reft_model.modules():
                if isinstance(module, OrthonormalRows):
                    X = module.X.to_local() if hasattr(module.X, "to_local") else module.X
                    X.mul_(scale)
            found.append(reft_model(input_ids=mine, labels=mine).loss)
            if shard:
                reft_model.reshard()
    if shard:
        for loss in found:
            dist.all_reduce(loss)
    return [float(loss) / (WORLD if shard else 1) for loss in found]


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    whole, sharded = losses(False, rank), losses(True, rank)
    assert len(set(whole)) == len(whole)  # every write shows
    assert sharded == pytest.approx(whole, rel=1e-5)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    in_processes(work, str(tmp_path / "rendezvous"))
