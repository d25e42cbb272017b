"""Megatron-LM's training loop: its own calls save and load through this engine.

    from asyncckpt.integrations import megatron_lm
    megatron_lm.install(keep_last=3)
    pretrain(...)                      # as ever, with --ckpt-format torch or torch_dist

Source: megatron/training/checkpointing.py and training.py of Megatron-LM (main of 2026-08).
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpointer import AsyncCheckpointer
from ..errors import CheckpointError, OptionError, RootError
from ..layouts import layout_named
from ..steps import RootView
from .megatron import checkpointer

_log = logging.getLogger(__name__)

_SAMPLES = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_LAYOUTS = {"torch": "megatron", "torch_dist": "megatron-dist"}  # by --ckpt-format
_OPERATIONS = "num_floating_point_operations_so_far"


def install(**options: Any) -> Installation:
    """Put this engine behind Megatron-LM's save_checkpoint and load_checkpoint. Call it before pretrain().

    Saves of `--ckpt-format torch` and `torch_dist` return at once and are committed in the background; what
    fails surfaces at a later save, or at the end. Loads take the newest step that is whole on all ranks. What
    this engine does not do goes to Megatron-LM's own code, unchanged: other formats, local and non-persistent
    checkpoints, --finetune, --dataloader-save, parts left out by --no-save-* or --no-load-*, and trees that
    Megatron-LM wrote itself.

    Args:
        options: of AsyncCheckpointer.

    Raises:
        ImportError: there is no Megatron-LM (the package megatron-core alone has no training loop).
        OptionError: it is installed already; uninstall() that first.
    """
    return Installation(options)


class Installation:
    """What was put in place."""

    def __init__(self, options: dict[str, Any]) -> None:
        from megatron.training import checkpointing

        if isinstance(getattr(checkpointing.save_checkpoint, "__self__", None), Installation):
            raise OptionError("megatron_lm.install() was called already: uninstall() that first")
        self._stock = checkpointing
        self._options = options
        self._checkpointers: dict[str, AsyncCheckpointer] = {}  # by real paths
        self._said: set[str] = set()
        self._operations = 0  # floating-point operations so far, at the latest save
        self._replaced: list[tuple[Any, str, Any]] = []
        self._stock_save = self._replace("save_checkpoint", self._save)
        self._stock_load = self._replace("load_checkpoint", self._load)
        self._stock_finalize = self._replace("maybe_finalize_async_save", self._finalize)

    def uninstall(self) -> None:
        """Wait for what is in flight, and put Megatron-LM's own functions back."""
        try:
            self.close()
        finally:
            for module, name, stock in self._replaced:
                setattr(module, name, stock)
            self._replaced.clear()

    def close(self) -> None:
        """Wait until every save is durable; raises what failed, once all are closed."""
        failed: Exception | None = None
        while self._checkpointers:
            _, one = self._checkpointers.popitem()
            try:
                one.close()
            except Exception as error:  # noqa: BLE001 -- it is raised below
                failed = failed or error
        if failed is not None:
            raise failed

    def _replace(self, name: str, ours: Callable[..., Any]) -> Any:
        """Everywhere it was imported to; the stock function."""
        owner = "async_utils" if name == "maybe_finalize_async_save" else "checkpointing"
        stock = getattr(sys.modules.get(f"megatron.training.{owner}"), name, None)
        for module in list(sys.modules.values()):  # some are None, or no modules
            if stock is not None and getattr(module, "__dict__", {}).get(name) is stock:
                self._replaced.append((module, name, stock))
                setattr(module, name, ours)
        return stock

    # -- what Megatron-LM calls

    def _save(
        self,
        iteration: int,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        num_floating_point_operations_so_far: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        settings = self._stock.get_args()
        why = self._not_ours(settings, ("no_save_optim", "no_save_rng", "dataloader_save"))
        given = (iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far)
        asked = inspect.signature(self._stock_save).bind(*given, *args, **kwargs).arguments
        if asked.get("non_persistent_ckpt") or asked.get("release"):
            why = "a non-persistent or a release checkpoint"
        if why:
            self._say(f"saved by Megatron-LM itself: {why}")
            return self._stock_save(*given, *args, **kwargs)
        one = self._over(Path(settings.save), model, optimizer, opt_param_scheduler, settings)
        counted = {name: int(getattr(settings, name, 0) or 0) for name in _SAMPLES}
        counted[_OPERATIONS] = self._operations = int(num_floating_point_operations_so_far or 0)
        return one.save(iteration, metadata={"megatron": counted})

    def _load(
        self,
        ddp_model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        load_arg: str = "load",
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, Any]:
        settings = self._stock.get_args()
        root = getattr(settings, load_arg, None)
        why = self._not_ours(
            settings, ("finetune", "no_load_optim", "no_load_rng", "override_ckpt_iteration")
        )
        if not why and not root:
            why = f"no --{load_arg}"
        elif not why and not self._wrote(Path(str(root)), settings):
            why = f"{root} has no step of asyncckpt"
        if why:
            self._say(f"loaded by Megatron-LM itself: {why}")
            stock: tuple[int, Any] = self._stock_load(
                ddp_model, optimizer, opt_param_scheduler, load_arg, *args, **kwargs
            )
            return stock
        path, step = Path(str(root)), getattr(settings, "ckpt_step", None)
        same = getattr(settings, "save", None) and os.path.realpath(settings.save) == os.path.realpath(path)
        one = self._over(path, ddp_model, optimizer, opt_param_scheduler, settings, read_only=not same)
        resume = one.load(step) if step is not None else one.load_latest()
        if resume is None:
            raise RuntimeError(f"{path}: the steps that were there are gone")
        counted = resume.metadata.get("megatron", {})
        for name in _SAMPLES:
            setattr(settings, name, counted.get(name, 0))
        self._stock.set_checkpoint_version(3.0)
        self._stock.update_num_microbatches(consumed_samples=settings.consumed_train_samples, verbose=True)
        return resume.step, counted.get(_OPERATIONS, 0)

    def _finalize(self, blocking: bool = False, terminate: bool = False) -> Any:
        if terminate:
            self.close()
        elif blocking:
            for one in self._checkpointers.values():
                one.wait()
        return self._stock_finalize(blocking=blocking, terminate=terminate) if self._stock_finalize else None

    # -- whose it is

    @staticmethod
    def _not_ours(settings: Any, flags: tuple[str, ...]) -> str:
        """Why this engine has no part in it; empty if it has."""
        if _format_of(settings) not in _LAYOUTS:
            return f"--ckpt-format {settings.ckpt_format}"
        if _format_of(settings) == "torch_dist":
            if not getattr(settings, "use_distributed_optimizer", False):
                return "--ckpt-format torch_dist without --use-distributed-optimizer"
            if getattr(settings, "data_parallel_random_init", False):
                return "--ckpt-format torch_dist with --data-parallel-random-init"
        set_flags = [name for name in flags if getattr(settings, name, None)]
        return f"--{set_flags[0].replace('_', '-')}" if set_flags else ""

    @staticmethod
    def _wrote(root: Path, settings: Any) -> bool:
        """Whether the step to load is one that this engine wrote; rank 0 looks, for all."""
        said: list[Any] = [False, ""]
        if dist.get_rank() == 0:
            step = getattr(settings, "ckpt_step", None)
            try:
                found = RootView(root, layout_named(_LAYOUTS[_format_of(settings)])).candidates()
            except CheckpointError as error:
                said = [False, str(error)]
            else:
                entries = [entry for entry in found if step is None or entry.step == step]
                said = [bool(entries) and not entries[0].foreign, ""]
        dist.broadcast_object_list(said, src=0)
        if said[1]:
            raise RootError(said[1])
        return bool(said[0])

    def _over(
        self, root: Path, model: Any, optimizer: Any, scheduler: Any, settings: Any, read_only: bool = False
    ) -> AsyncCheckpointer:
        """The checkpointer of a root; made at its first use, by all ranks together."""
        key = os.path.realpath(root)  # --save and --load may spell one directory in two ways
        if key not in self._checkpointers:
            self._checkpointers[key] = checkpointer(
                root.absolute(),
                model=model,
                optimizer=optimizer,
                opt_param_scheduler=scheduler,
                args=settings,
                also={_OPERATIONS: lambda: self._operations},
                format=_format_of(settings),
                read_only=read_only,
                **self._options,
            )
        return self._checkpointers[key]

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s", what)


def _format_of(settings: Any) -> str:
    return str(getattr(settings, "ckpt_format", None) or "torch")
