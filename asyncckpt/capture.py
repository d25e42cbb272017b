"""What cannot wait for the step fence is copied inside save().

Volatile are a model's buffers (forward changes them), the optimizer's own numbers (a scheduler changes
them), and every tensor outside model and optimizer (a sampler may advance at any time), however deep it
is hidden in python objects. Python leaves are pickled inside save() anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import devices
from .plan import Planned, span_nbytes
from .shards import is_partial, local_of
from .tree import flatten, rebuilt, tensors_in

_DEVICE_NBYTES_MAX = 16 << 20  # copies of what is on devices stay there, on the stream that changes it


@dataclass(frozen=True)
class Captured:
    """A tree in which what is volatile is a copy.

    Attributes:
        tree: as it was, with copies in place of volatile tensors.
        live: names and tensors that are still the live ones; the guard watches them.
        seen: ids of all tensors in the tree, copies too.
        nbytes: copied, on the host.
        forward_changes: some buffer was too large to copy; the next forward must wait.
    """

    tree: dict[str, Any]
    live: list[tuple[str, torch.Tensor]]
    seen: frozenset[int]
    nbytes: int
    forward_changes: bool


def capture(tree: Mapping[str, Any], buffers: set[int], reserve_nbytes: int) -> Captured:
    """Copy what is volatile, at most `reserve_nbytes` on the host and as little on devices; what is left
    over stays live.

    Args:
        buffers: addresses of the model's buffers.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    left = {True: reserve_nbytes, False: _DEVICE_NBYTES_MAX}  # on the host, on devices
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
            size = span_nbytes(local)
            on_host = devices.seam.device_of(local) == devices.HOST
            if size > left[on_host]:
                forward_changes = forward_changes or local.data_ptr() in buffers
                return tensor
            left[on_host] -= size
            copies[key] = tensor.detach().clone()
        return copies[key]

    result = dict(tree)
    for name, branch in tree.items():
        if name == "model":
            if buffers:
                result[name] = {key: copy(v) if _is_buffer(v, buffers) else v for key, v in branch.items()}
        elif name == "optimizer":
            result[name] = _with_groups(branch, copy)
        else:
            result[name] = rebuilt(branch, torch.Tensor, copy, objects=False)
    ours = {id(tensor) for tensor in copies.values()}
    every = [(leaf.name, tensor) for leaf in flatten(result) for tensor in tensors_in(leaf.value)]
    live = [(name, tensor) for name, tensor in every if id(tensor) not in ours]
    nbytes = reserve_nbytes - left[True]
    return Captured(result, live, frozenset(id(tensor) for _, tensor in every), nbytes, forward_changes)


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


def capture_hidden(captured: Captured, planned: Planned, reserve_nbytes: int) -> tuple[Captured, Planned]:
    """The same for tensors that only pickling found, inside objects that are no containers to us.

    Their storages are copied and take the place of the live ones in the plan; beyond the reserve they
    stay live, and are watched.
    """
    hidden = [(name, tensor) for name, tensor in planned.tensors if id(tensor) not in captured.seen]
    if not hidden:
        return captured, planned
    memory = {local_of(t).untyped_storage().data_ptr() for _, t in hidden if t.layout == torch.strided}
    left = {True: reserve_nbytes - captured.nbytes, False: _DEVICE_NBYTES_MAX}
    addresses = planned.addresses.copy()
    copies = []
    live = set(memory)
    for source, storage in planned.storages:
        on_host = planned.devices[source] == devices.HOST
        if storage.data_ptr() in memory and storage.nbytes() <= left[on_host]:
            left[on_host] -= storage.nbytes()
            copies.append(storage.clone())  # type: ignore[no-untyped-call]
            addresses[source] = copies[-1].data_ptr()
            live.discard(storage.data_ptr())
    watched = [
        (name, tensor)
        for name, tensor in hidden
        if tensor.layout != torch.strided or local_of(tensor).untyped_storage().data_ptr() in live
    ]
    nbytes = reserve_nbytes - left[True]
    return (
        replace(captured, live=captured.live + watched, nbytes=nbytes),
        replace(planned, addresses=addresses, held=(*planned.held, copies)),
    )
