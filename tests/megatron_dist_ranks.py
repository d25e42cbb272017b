"""Megatron's `torch_dist` format by its own code: what Megatron-LM does around megatron-core, for a `Job`."""

from __future__ import annotations

import random
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from tests.megatron_ranks import TRACKER, Job, _own_steps, _step_is_not_in_the_file


def content(fully_reshardable: bool = False) -> dict[str, Any]:
    """What Megatron-LM's `_build_sharded_state_dict_metadata` makes of its arguments, in its order."""
    form: dict[str, Any] = {"distrib_optim_sharding_type": "dp_reshardable"}
    if fully_reshardable:
        form = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
    return {**form, "singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def directory_of(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def sharded_state(
    job: Job, described: dict[str, Any], *, loading: bool = False, optimizer: bool = True
) -> dict[str, Any]:
    """What Megatron-LM's `generate_state_dict` makes for this format, to save or to load into."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    metadata = {
        **described,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {"args": job._args(0), "checkpoint_version": 3.0, "iteration": job.iteration}
    chunks = [chunk.module.module if job.layout.bf16 else chunk.module for chunk in job.chunks]
    for index, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{index}"
        state[name] = chunk.sharded_state_dict(metadata=metadata)
    if optimizer:
        state["optimizer"] = job.optimizer.sharded_state_dict(state, metadata=metadata, is_loading=loading)
        state["opt_param_scheduler"] = job.scheduler.state_dict()
    generators = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    state["rng_state"] = ShardedObject(
        "rng_state",
        [generators],
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return state


def stock_save(job: Job, root: Path, *, fully_reshardable: bool = False, newer: bool = False) -> Path:
    """The tree that Megatron-LM's `save_checkpoint` leaves; on all ranks.

    Args:
        newer: as megatron-core 0.19, which has an item where older ones have common.pt.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    job.sync()
    directory = directory_of(root, job.iteration)
    directory.mkdir(parents=True, exist_ok=True)
    described = content(fully_reshardable)
    state = sharded_state(job, described)
    if newer:
        common = {name: state.pop(name) for name in ("args", "checkpoint_version", "iteration")}
        common |= {"opt_param_scheduler": state.pop("opt_param_scheduler"), "content_metadata": described}
        state["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank())
    # Where a save is not asynchronous, results stay in this process: no need to spawn a manager for them.
    with patch.object(filesystem_async, "_results_queue", SimpleQueue()):
        dist_checkpointing.save(state, str(directory), content_metadata=described)
    if dist.get_rank() == 0:
        if newer:
            (directory / "common.pt").unlink()
        (root / TRACKER).write_text(str(job.iteration))
    dist.barrier()
    return directory


def stock_load(job: Job, root: Path, *, generators: bool = True) -> None:
    """The iteration that the tracker names, as Megatron-LM's `load_checkpoint` loads it into a fresh job.

    Args:
        generators: load them too; it does so where the parallelism of the model is that of the save.
    """
    from megatron.core import dist_checkpointing, tensor_parallel

    for optimizer in job.optimizers():  # torch's Adam has a step once it has made one
        optimizer._init_optimizer_states_with_dummy_values()
    directory = directory_of(root, int((root / TRACKER).read_text()))
    described = dist_checkpointing.load_content_metadata(str(directory))
    wanted = sharded_state(job, described, loading=True)
    if not generators:
        del wanted["rng_state"]
    state = dist_checkpointing.load(wanted, str(directory))
    assert state["checkpoint_version"] == 3.0
    job.iteration = state["iteration"]
    load_model(job, state)
    with _step_is_not_in_the_file(), torch.no_grad():
        job.optimizer.load_state_dict(state["optimizer"])
    _own_steps(job.optimizers())
    job.scheduler.load_state_dict(state["opt_param_scheduler"])
    if not generators:
        return
    (drawn,) = state["rng_state"]
    random.setstate(drawn["random_rng_state"])
    np.random.set_state(drawn["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(drawn["torch_rng_state"])
    torch.cuda.set_rng_state(drawn["cuda_rng_state"])
    assert drawn["rng_tracker_states"]  # Megatron-LM exits without
    tensor_parallel.get_cuda_rng_tracker().set_states(drawn["rng_tracker_states"])


def stock_load_model(job: Job, directory: Path) -> None:
    """The model alone, at whatever parallelism this is."""
    from megatron.core import dist_checkpointing

    state = sharded_state(job, content(), loading=True, optimizer=False)
    del state["rng_state"]
    load_model(job, dist_checkpointing.load(state, str(directory)))


def load_model(job: Job, state: dict[str, Any]) -> None:
    for index, chunk in enumerate(job.chunks):
        inner = chunk.module.module if job.layout.bf16 else chunk.module
        inner.load_state_dict(state["model" if len(job.chunks) == 1 else f"model{index}"], strict=True)
