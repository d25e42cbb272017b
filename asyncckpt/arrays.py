"""CuPy arrays in `extra`, as tensors over the same memory.

Guarantees:
- An array is saved as what it is to torch: an ordinary tensor, in files that need no CuPy. On load it is
  filled itself; nothing is copied on the way but the bytes.
- What CuPy's current stream has for an array when save() or load() is called comes first; neither waits
  for it on the host. What that stream is given after save(), or after the fence where an array was too large
  to be copied inside save(), comes after the copies. Work on its other streams is the caller's to order.
- CuPy is never imported. A run that did not import it pays for one look-up of its name.

By DLPack, not `__cuda_array_interface__`: there torch names the stream on which it will read, and CuPy lets
that stream wait for its own. Of the other protocol torch takes the address and ignores the stream
(torch/csrc/utils/tensor_numpy.cpp).

Arrays are looked for in `extra` and in dicts with string keys inside it. Elsewhere (in lists, in what a
state_dict() returns) CuPy pickles them: a copy to the host that save() waits for, and loading asks for
trusted=True. CuPy counts no versions, so the guard does not see what is written, without a fence, to an array
that was too large to be copied inside save(); `guard="full"` does.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from .devices import HOST
from .errors import LeafError

_CUDA = 2  # kDLCUDA, a kind of device as DLPack numbers them
_LEGACY_STREAMS = (0, 1)  # both mean the device's default stream; above them, 2 is the thread's own


def is_array(value: Any) -> bool:
    """Whether `value` is a CuPy array."""
    kind = getattr(sys.modules.get("cupy"), "ndarray", None)  # absent, too, while CuPy is being imported
    return kind is not None and isinstance(value, kind)


def holds_arrays(value: Any) -> bool:
    """Whether there are arrays in a dict with string keys, or in such dicts inside it."""
    seen: set[int] = set()
    rest = [value] if "cupy" in sys.modules else []
    while rest:
        branch = rest.pop()
        if _is_branch(branch) and id(branch) not in seen:
            seen.add(id(branch))
            if any(map(is_array, branch.values())):
                return True
            rest += branch.values()
    return False


def _is_branch(value: Any) -> bool:
    return type(value) is dict and all(type(key) is str for key in value)


def as_tensor(name: str, array: Any) -> torch.Tensor:
    """The array as a tensor over its memory, for use on torch's current stream; it keeps the array.

    Raises:
        LeafError: torch has no such tensors.
    """
    # In both cases torch would not say so: a negative stride ends the process (c10::Error behind a
    # noexcept), and CuPy rounds a stride between two elements down.
    if any(stride < 0 for stride in array.strides):
        raise LeafError(f"{name}: the array's strides are negative, which torch does not know; save a copy")
    if any(stride % array.itemsize for stride in array.strides):
        raise LeafError(f"{name}: the array's strides are no multiples of its itemsize; save a copy")
    try:
        kind, device = array.__dlpack_device__()
        # The stream that CuPy orders is the current one of the *current* device.
        with torch.cuda.device(device) if kind == _CUDA else nullcontext():
            tensor: torch.Tensor = from_dlpack(array)
    except Exception as error:  # two libraries, and whatever they find fault with
        raise LeafError(f"{name}: a CuPy array that torch cannot see as a tensor: {error}") from error
    if tensor.data_ptr() % tensor.element_size():
        raise LeafError(f"{name}: the array's memory is not aligned to its itemsize; save a copy")
    return tensor


def as_tensors(name: str, value: Any, used: set[int]) -> Any:
    """`value` with tensors in place of arrays, where it is or holds any: dicts are new then. Their devices
    are added to `used`.

    Raises:
        LeafError: as in `as_tensor`, or the value contains itself.
    """

    def visit(name: str, value: Any) -> Any:
        if is_array(value):
            tensor = as_tensor(name, value)
            used.add(tensor.get_device())
            return tensor
        if _is_branch(value):
            return {key: visit(f"{name}.{key}", child) for key, child in value.items()}
        return value

    try:
        return visit(name, value) if is_array(value) or holds_arrays(value) else value
    except RecursionError:
        raise LeafError(f"{name} refers to itself, or is nested too deeply to be saved") from None


def order_after_torch(used: set[int]) -> None:
    """Let CuPy's current streams on these devices wait for all that torch's current streams have now.

    The other direction is DLPack's: see `as_tensor`. The host does not wait.
    """
    for device in used - {HOST}:
        with torch.cuda.device(device):
            handle = sys.modules["cupy"].cuda.get_current_stream().ptr
            theirs = (
                torch.cuda.default_stream(device)
                if handle in _LEGACY_STREAMS  # ExternalStream(0) is some stream of torch's pool
                else torch.cuda.ExternalStream(handle, device)  # type: ignore[no-untyped-call]
            )
            ours = torch.cuda.current_stream(device)
            if theirs.cuda_stream != ours.cuda_stream:
                theirs.wait_stream(ours)
