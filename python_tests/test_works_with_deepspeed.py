"""DeepSpeed ZeRO-3 on two processes of one CPU trains as one process on the joint batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_processes import CASES, STEPS, WORLD, as_launched, free_port, in_processes, joint_batch, make, share, train

from reft_kernels.model import ReftModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def sharded(rank: int, port: int, folder: str) -> None:
    as_launched(rank, port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    mine = share(rank)
    for case in CASES:
        alone = make(case["component"])
        wanted = train(alone, list(alone.interventions.parameters()), joint_batch())
        reft_model = make(**case)
        parameters = list(reft_model.interventions.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        engine, *_ = deepspeed.initialize(model=reft_model, optimizer=optimizer, config=CONFIG)
        assert all(p.numel() == 0 and hasattr(p, "ds_id") for p in reft_model.parameters())
        losses = []
        for _ in range(STEPS):
            loss = engine(input_ids=mine, labels=mine, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses)
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / WORLD, wanted, rtol=1e-5, atol=1e-5, msg=str(case))
        with deepspeed.zero.GatheredParameters(parameters):
            for one, other in zip(parameters, alone.interventions.parameters(), strict=True):
                torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-4, atol=1e-5, msg=str(case))
            if rank == 0:
                reft_model.save(Path(folder) / case["component"] / str(case["reentrant"]))
    dist.barrier()
    os._exit(0)  # DeepSpeed leaves threads behind that can abort a process which ends in the usual way


def test_zero_3(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    in_processes(sharded, free_port(), str(tmp_path))
    alone = make()
    train(alone, list(alone.interventions.parameters()), joint_batch())
    loaded = ReftModel.load(tmp_path / "block_output" / "None", make().model)
    for one, other in zip(loaded.interventions.parameters(), alone.interventions.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
