"""What cannot wait for the step fence is copied inside save().

Volatile are a model's buffers (forward changes them), the optimizer's own numbers (a scheduler changes
them), and every tensor outside model and optimizer (a sampler may advance at any time), however deep it
is hidden in python objects. Python leaves are pickled inside save() anyway.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from . import devices
from .plan import Planned, span_nbytes
from .report import SaveReport
from .shards import Boxed, is_partial, local_of
from .tree import StateTree, named_tensors_in, rebuilt

_log = logging.getLogger(__name__)

_Copied = TypeVar("_Copied", torch.Tensor, torch.UntypedStorage)

_MODEL = re.compile(r"model[0-9]*")  # a model's branch, or that of a chunk of one
_DEVICE_NBYTES_MAX = 16 << 20  # copies of what is on devices stay there, on the stream that changes it


class Reserve:
    """Memory for what one save() copies, on the host and on devices: what saves in flight leave of it.

    Attributes:
        host_nbytes, device_nbytes: taken from it.
    """

    def __init__(self, host_nbytes_max: int, in_flight: Iterable[SaveReport]) -> None:
        self._host_nbytes_max = host_nbytes_max
        self._device_nbytes_max = _DEVICE_NBYTES_MAX
        for report in in_flight:
            self._host_nbytes_max -= report.captured_nbytes - report.captured_on_devices_nbytes
            self._device_nbytes_max -= report.captured_on_devices_nbytes
        self.host_nbytes = 0
        self.device_nbytes = 0

    def copy(self, value: _Copied, nbytes: int, make: Callable[[], _Copied]) -> _Copied | None:
        """What `make` makes of `value`; None if there is no room for it."""
        memory = local_of(value) if isinstance(value, torch.Tensor) else value
        if devices.seam.device_of(memory) == devices.HOST:
            if self.host_nbytes + nbytes > self._host_nbytes_max:
                return None
            made = make()
            self.host_nbytes += nbytes
            return made
        if self.device_nbytes + nbytes > self._device_nbytes_max:
            return None
        try:
            made = make()
        except torch.OutOfMemoryError as error:
            _log.warning("no room on a device to copy what may change: it is watched instead: %s", error)
            self._device_nbytes_max = 0  # each try empties torch's cache, which waits for the device
            return None
        self.device_nbytes += nbytes
        return made


@dataclass(frozen=True)
class Captured:
    """A tree in which what is volatile is a copy.

    Attributes:
        tree: as it was, with copies in place of volatile tensors.
        live: names and tensors that are still the live ones; the guard watches them. Without the steady ones,
            where the tree is not whole.
        seen: ids of all tensors in the tree, copies too.
        forward_changes: some buffer was too large to copy; the next forward must wait.
    """

    tree: StateTree
    live: list[tuple[str, torch.Tensor]]
    seen: frozenset[int]
    forward_changes: bool


def capture(tree: StateTree, buffers: set[int], reserve: Reserve) -> Captured:
    """Copy what is volatile, as far as the reserve goes; what is left over stays live.

    Args:
        buffers: addresses of the model's buffers.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    forward_changes = False

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal forward_changes
        if tensor.layout != torch.strided or not devices.is_reachable(tensor) or is_partial(tensor):
            return tensor  # the planner refuses it by name
        local = local_of(tensor)
        key = (
            local.data_ptr() or id(local), local.dtype, tensor.shape, local.shape, local.stride(),
            local.is_conj(), local.is_neg(),
        )  # fmt: skip
        if key not in copies:
            made = reserve.copy(tensor, span_nbytes(local), lambda: tensor.detach().clone())
            if made is None:
                forward_changes = forward_changes or local.data_ptr() in buffers
                return tensor
            copies[key] = made
        return copies[key]

    result = tree.like(tree)
    for name, branch in tree.items():
        if _MODEL.fullmatch(name):
            if buffers:
                result[name] = {key: _with_buffers(v, buffers, copy) for key, v in branch.items()}
        elif name == "optimizer":
            result[name] = _with_groups(branch, copy)
        else:
            result[name] = rebuilt(branch, torch.Tensor, copy, objects=False)
    ours = {id(tensor) for tensor in copies.values()}
    every = [named for leaf in result.leaves() for named in named_tensors_in(leaf)]
    live = [(name, tensor) for name, tensor in every if id(tensor) not in ours]
    return Captured(result, live, frozenset(id(tensor) for _, tensor in every), forward_changes)


def _with_buffers(value: Any, buffers: set[int], copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of what is a buffer; all else as it is."""
    if isinstance(value, Boxed):
        return replace(value, tensor=copy(value.tensor)) if _is_buffer(value.tensor, buffers) else value
    return copy(value) if _is_buffer(value, buffers) else value


def _is_buffer(value: Any, buffers: set[int]) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return local_of(value).data_ptr() in buffers


def _with_groups(branch: Any, copy: Any) -> Any:
    """An optimizer's branch (or several) with copies of the tensors in its groups, not of its state."""
    if not isinstance(branch, Mapping):
        return branch
    if "param_groups" not in branch:
        return {name: _with_groups(child, copy) for name, child in branch.items()}
    return {**branch, "param_groups": rebuilt(branch["param_groups"], torch.Tensor, copy, objects=False)}


def capture_hidden(captured: Captured, planned: Planned, reserve: Reserve) -> tuple[Captured, Planned]:
    """The same for tensors that only pickling found, inside objects that are no containers to us.

    Their storages are copied and take the place of the live ones in the plan; beyond the reserve they
    stay live, and are watched.
    """
    hidden = [(name, tensor) for name, tensor in planned.tensors if id(tensor) not in captured.seen]
    if not hidden:
        return captured, planned
    memory = {local_of(t).untyped_storage().data_ptr() for _, t in hidden if t.layout == torch.strided}
    addresses = planned.addresses.copy()
    copies = []
    live = set(memory)
    for source, storage in planned.storages:
        if storage.data_ptr() not in memory:
            continue
        made = reserve.copy(storage, storage.nbytes(), storage.clone)
        if made is not None:
            copies.append(made)
            addresses[source] = made.data_ptr()
            live.discard(storage.data_ptr())
    watched = [
        (name, tensor)
        for name, tensor in hidden
        if tensor.layout != torch.strided or local_of(tensor).untyped_storage().data_ptr() in live
    ]
    return (
        replace(captured, live=captured.live + watched),
        replace(planned, addresses=addresses, held=(*planned.held, copies)),
    )
