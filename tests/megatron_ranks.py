"""Ranks that train with real megatron-core, on the CPU over gloo.

Megatron is written for CUDA; `cuda_is_cpu` is the one place that bends it, inside a rank's own process and
until the end of the block. Nothing here knows asyncckpt: what is saved and loaded, Megatron's own code does.

A rank's body, for `process_world.World.run` with tensor * pipeline * data ranks:

    with megatron(layout):
        job = Job(layout)
        job.train_step(0)
        stock_save_checkpoint(job, root)
        fresh = Job(layout, seed=2)
        stock_load_checkpoint(fresh, root)
"""

from __future__ import annotations

import dataclasses
import logging
import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests.process_world import process_world

# Names, for a server that has not started: nothing is imported here, and a run that collects no test of
# Megatron does not pay for it.
get_context("forkserver").set_forkserver_preload([process_world.__module__, "tests.megatron_imports"])

VOCABULARY = 100
SEQUENCE = 8
BATCH = 2
STATES = ("param", "exp_avg", "exp_avg_sq")
OPTIMIZER_FILE, MODEL_FILE = "distrib_optim.pt", "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is cut, and its kind."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    """Chunks of each pipeline stage."""
    expert: int = 1
    experts: int | None = None
    """Experts of each layer, with which Megatron wants `tensor` to be 1; None is a dense model."""
    bf16: bool = True
    overlap_param_gather: bool = False
    layers: int = 2
    hidden: int = 72
    bucket_size: int = 20_000
    """Parameters of a bucket of the optimizer's; there are several."""


LAYOUTS = {
    "tensor-bf16": Layout(tensor=2),
    "tensor-fp32": Layout(tensor=2, bf16=False),
    "data-bf16": Layout(),
    "data-fp32": Layout(bf16=False),
    "data-bf16-lazy": Layout(overlap_param_gather=True),
    "expert": Layout(expert=2, experts=4),
    "pipeline": Layout(pipeline=2),
    "pipeline-virtual": Layout(pipeline=2, virtual=2, layers=4),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a shard lies in the flat tensors `param`, `exp_avg` and `exp_avg_sq` of distrib_optim.pt."""

    buffer: int
    dtypes: tuple[torch.dtype, torch.dtype]
    """Of parameters and gradients: the key below the buffer's number."""
    bucket: int
    start: int
    end: int


class _CudaIsCpu(TorchFunctionMode):
    """Tensors asked for on a CUDA device are made on the CPU, and claim the other when asked their type."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer tells half from full precision by "torch.cuda.BFloat16Tensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


@contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Megatron finds its CUDA device, which is the CPU. Of this process, and undone at the end.

    torch.cuda.is_available() stays False: only what Megatron calls without asking is stood in for.
    """
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as megatron_moe

    # The CUDA generator is the CPU's, so that Megatron's own tracker of named CUDA generators decides what
    # dropout draws, as on a GPU.
    def get_rng_state(*_device: Any, **_devices: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_device: Any, **_options: Any) -> None:
        torch.set_rng_state(state)

    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: "cpu"),  # used as `device=torch.cuda.current_device()`
        (torch.cuda, "synchronize", lambda *_: None),  # there is nothing to wait for
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_rng_state),
        (torch.cuda, "set_rng_state", set_rng_state),
        (torch.cuda.random, "get_rng_state", get_rng_state),  # the tracker's fork calls it by this name
        (megatron_random, "_set_cuda_rng_state", set_rng_state),  # it reaches for torch.cuda's generators
        (torch._dynamo.config, "disable", True),  # a C++ compiler for a model of this size takes minutes
    ]
    # On a GPU it means a mistake that the CPU's generator moved in a fork; here the two are one.
    logger = logging.getLogger(megatron_random.__name__)
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        # Its import sits behind that of Transformer Engine, its use does not.
        stack.enter_context(patch.object(megatron_moe, "te_general_gemm", None, create=True))
        stack.enter_context(patch.object(logger, "disabled", True))
        stack.enter_context(_CudaIsCpu())
        yield


@contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Megatron's process groups and generators, in a rank whose default group is up."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.megatron_imports import SAFE_GLOBALS

    with cuda_is_cpu(), torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # of what only a GPU has
        # In fp32 the optimizer's shards are views of the parameters.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual,
            expert_model_parallel_size=layout.expert,
        )
        try:
            # Ranks of one stage draw alike in what they share: what Megatron-LM's initialize.py does.
            seed = 1234 + 100 * parallel_state.get_pipeline_model_parallel_rank()
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 -- it is this one that Megatron saves
            torch.manual_seed(seed)
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            yield
        finally:
            parallel_state.destroy_model_parallel()


class Job:
    """A small GPT on this rank, in Megatron's DDP, with its distributed optimizer and its scheduler."""

    def __init__(self, layout: Layout, seed: int = 1) -> None:
        from megatron.core import parallel_state
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.layout = layout
        self.iteration = 0
        with _own_draws(seed):
            self.chunks = [self._chunk(index) for index in range(layout.virtual or 1)]
        for chunk in self.chunks:
            chunk.broadcast_params()
        config = OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-3, weight_decay=0.01, clip_grad=1.0, bf16=layout.bf16,
            params_dtype=torch.bfloat16 if layout.bf16 else torch.float32, use_distributed_optimizer=True,
            overlap_param_gather=layout.overlap_param_gather,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(config, self.chunks)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=1e-3, max_lr=1e-2, min_lr=1e-3, lr_warmup_steps=2, lr_decay_steps=50,
            lr_decay_style="linear", start_wd=0.01, end_wd=0.1, wd_incr_steps=50, wd_incr_style="linear",
        )  # fmt: skip
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.replica = parallel_state.get_data_parallel_rank()

    def _chunk(self, index: int) -> Any:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.transformer_config import TransformerConfig

        layout = self.layout
        config = TransformerConfig(
            num_layers=layout.layers, hidden_size=layout.hidden, num_attention_heads=4,
            ffn_hidden_size=2 * layout.hidden + 6, tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual, expert_model_parallel_size=layout.expert,
            num_moe_experts=layout.experts, add_bias_linear=layout.experts is None, bf16=layout.bf16,
            params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
            pipeline_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
            use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
            bias_activation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        )  # fmt: skip
        stage = index if layout.virtual else None
        model: Any = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=layout.experts),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=True,
            vp_stage=stage,
        )
        if layout.bf16:
            model = Float16Module(config, model)
        return DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,  # else one bucket, whatever bucket_size says
                overlap_param_gather=layout.overlap_param_gather,
                bucket_size=layout.bucket_size,
            ),
            model,
            disable_bucketing=index > 0,  # as Megatron-LM does
        )

    def train_step(self, number: int) -> float:
        """One step on batch `number` of this replica: forward, backward, clip, Adam, schedule. The loss.

        A pipeline stage is fed activations that are made up instead of its predecessor's.
        """
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = 0.0
        for index, chunk in enumerate(self.chunks):
            loss = self._loss(chunk, number, index)
            loss.backward()
            total += loss.item()
        finalize_model_grads(self.chunks)
        done, _norm, _zeros = self.optimizer.step()
        assert done
        self.scheduler.step(BATCH)
        self.iteration += 1
        return total

    def _loss(self, chunk: Any, number: int, index: int) -> torch.Tensor:
        fed = torch.Generator().manual_seed(1000 * number + 100 * self.stage + 10 * index + self.replica)
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=fed)
        positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
        model = chunk.module.module if self.layout.bf16 else chunk.module
        if not model.pre_process:
            dtype = torch.bfloat16 if self.layout.bf16 else torch.float32
            model.set_input_tensor(torch.randn(SEQUENCE, BATCH, self.layout.hidden, generator=fed).to(dtype))
        output = chunk(tokens[:, :-1], positions, mask, labels=tokens[:, 1:] if model.post_process else None)
        return output.float().mean() if model.post_process else output.float().square().mean()

    def sync(self) -> None:
        """Parameters are whole on every rank, also where the gathers wait for the next forward."""
        if self.layout.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def model_optim_rng(self) -> dict[str, Any]:
        """What Megatron-LM's `generate_state_dict` and `save_checkpoint` put into model_optim_rng.pt."""
        from megatron.core import tensor_parallel

        consumed = 2 * BATCH * self.iteration
        state: dict[str, Any] = {
            "args": self._args(consumed),
            "checkpoint_version": 3.0,
            "iteration": self.iteration,
        }
        for index, chunk in enumerate(self.chunks):
            name = "model" if len(self.chunks) == 1 else f"model{index}"
            state[name] = chunk.state_dict_for_save_checkpoint()
        state["optimizer"] = self.optimizer.state_dict()
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        state["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),  # noqa: NPY002
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.cuda.get_rng_state(),
                "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
            }
        ]
        state["num_floating_point_operations_so_far"] = 1_000_000 * self.iteration
        return state

    def _args(self, consumed: int) -> Namespace:
        return Namespace(
            num_layers=self.layout.layers, hidden_size=self.layout.hidden, num_attention_heads=4,
            tensor_model_parallel_size=self.layout.tensor,
            pipeline_model_parallel_size=self.layout.pipeline,
            virtual_pipeline_model_parallel_size=self.layout.virtual,
            expert_model_parallel_size=self.layout.expert, bf16=self.layout.bf16,
            use_distributed_optimizer=True, ckpt_format="torch", data_parallel_random_init=False,
            consumed_train_samples=consumed, skipped_train_samples=0, consumed_valid_samples=0,
        )  # fmt: skip

    def stock_load_model_optim_rng(self, path: Path) -> None:
        """What Megatron-LM's `load_checkpoint` does with it: model, optimizer, scheduler, generators.

        Into a fresh job, as there: the scheduler counts the saved steps on top of its own.
        """
        from megatron.core import tensor_parallel

        state = stock_read(path)
        assert state["checkpoint_version"] == 3.0
        self.iteration = state["iteration"]
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model" if len(self.chunks) == 1 else f"model{index}"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        _own_steps(self.optimizers())
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        (rng,) = state["rng_state"]
        random.setstate(rng["random_rng_state"])
        np.random.set_state(rng["np_rng_state"])  # noqa: NPY002
        torch.set_rng_state(rng["torch_rng_state"])
        torch.cuda.set_rng_state(rng["cuda_rng_state"])
        assert rng["rng_tracker_states"]  # Megatron-LM exits without
        tensor_parallel.get_cuda_rng_tracker().set_states(rng["rng_tracker_states"])

    def optimizers(self) -> list[Any]:
        """The distributed optimizers, dense and expert."""
        return list(self.optimizer.chained_optimizers)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The model's parameters, copied."""
        return {
            f"{index}.{name}": value.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, value in chunk.module.named_parameters()
        }

    def shards(self) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
        """The optimizers' state on this rank, copied: {(optimizer, parameter): {"param": .., "exp_avg": ..}}.

        Shards are flat and fp32; Adam's `step` is among them.
        """
        found = {}
        for number, name, optimizer, param in self._owned():
            states = optimizer._get_main_param_and_optimizer_states(param)
            elements = optimizer._get_model_param_range_map(param)["param"].size
            assert all(states[key].shape == (elements,) for key in STATES)
            found[number, name] = {key: value.detach().clone() for key, value in states.items()}
        return found

    def places(self) -> dict[tuple[int, str], Place]:
        """Where Megatron's file has each of `shards`."""
        found = {}
        for number, name, optimizer, param in self._owned():
            buffer, dtypes, bucket = optimizer.model_param_gbuf_map[param]
            # Buckets follow each other without the padding at their ends; what pads parameters inside stays.
            buckets = optimizer.buffers[buffer].buckets
            before = sum(earlier.numel_unpadded for earlier in buckets[:bucket])
            inside = optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            found[number, name] = Place(buffer, dtypes, bucket, before + inside.start, before + inside.end)
        return found

    def _owned(self) -> Iterator[tuple[int, str, Any, torch.Tensor]]:
        names = {
            value: f"{index}.{name}"
            for index, chunk in enumerate(self.chunks)
            for name, value in chunk.module.named_parameters()
        }
        for number, optimizer in enumerate(self.optimizers()):
            for param in optimizer.model_param_gbuf_map:
                yield number, names[param], optimizer, param


def same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        same(value, other[key]) if isinstance(value, dict) else torch.equal(value, other[key])
        for key, value in one.items()
    )


@contextmanager
def _own_draws(seed: int) -> Iterator[None]:
    """Draws from `seed`, and the generators as they were."""
    from megatron.core.tensor_parallel.random import _fork_rng

    with _fork_rng():
        torch.manual_seed(seed)
        yield


def stock_read(path: Path) -> Any:
    """The file as Megatron reads it since 0.15: plain values, tensors, and the classes of its own list.

    These are known inside of `megatron`.
    """
    return torch.load(path, map_location="cpu", weights_only=True)


def stock_save(optimizer: Any, path: Path) -> None:
    """Megatron's own distrib_optim.pt, gathered over gloo; on all ranks, each with its own model's path."""
    optimizer.save_parameter_state(str(path))


def stock_load(optimizer: Any, path: Path) -> None:
    """Megatron's own load of it, after the optimizer's load_state_dict; on all ranks."""
    # no_grad: fp32 shards are views of parameters that require grad, and the load copies into them.
    with _step_is_not_in_the_file(), torch.no_grad():
        optimizer.load_parameter_state(str(path))


@contextmanager
def _step_is_not_in_the_file() -> Iterator[None]:
    """torch's Adam keeps `step` in each state, for which 0.16.1 looks in a file that has none: KeyError."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_the_step_it_has(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        step = self._get_main_param_and_optimizer_states(model_param)["step"]
        stock(self, model_param, {**tensors, "step": step})

    with patch.object(DistributedOptimizer, stock.__name__, with_the_step_it_has):
        yield


def _own_steps(optimizers: list[Any]) -> None:
    """load_state_dict gives one tensor `step` to all states, which torch's Adam then counts up for each."""
    for optimizer in optimizers:
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()


def model_directory(iteration: Path) -> Path:
    """`mp_rank_xx[_xxx][_xxx]` of this rank below its iteration, as Megatron-LM's get_checkpoint_name."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return iteration / name


def writes_the_model() -> bool:
    """Whether Megatron-LM lets this rank write its model_optim_rng.pt."""
    from megatron.core import parallel_state

    return 0 in (parallel_state.get_data_parallel_rank(), parallel_state.get_expert_data_parallel_rank())


def stock_save_checkpoint(job: Job, root: Path) -> Path:
    """The tree that Megatron-LM's `save_checkpoint` leaves, by all ranks; this rank's model's directory."""
    job.sync()
    directory = model_directory(root / f"iter_{job.iteration:07d}")
    directory.mkdir(parents=True, exist_ok=True)
    stock_save(job.optimizer, directory / OPTIMIZER_FILE)
    state = job.model_optim_rng()
    if writes_the_model():
        torch.save(state, directory / MODEL_FILE)
    dist.barrier()
    if dist.get_rank() == 0:
        (root / TRACKER).write_text(str(job.iteration))
    dist.barrier()
    return directory


def stock_load_checkpoint(job: Job, root: Path) -> None:
    """The iteration that the tracker names, as Megatron-LM's `load_checkpoint` loads it. On all ranks."""
    directory = model_directory(root / f"iter_{int((root / TRACKER).read_text()):07d}")
    job.stock_load_model_optim_rng(directory / MODEL_FILE)
    stock_load(job.optimizer, directory / OPTIMIZER_FILE)
