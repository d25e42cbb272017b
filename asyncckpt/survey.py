"""What many tensors are in memory, and what is in many dictionaries, without a call of python for each.

Thousands of tensors are asked twice in every save: where they are, whether they were written to, and whether
they are what they were at the last save. By DLPack's table of C functions, which torch hangs on its tensors,
and by torch's C++ functions for what the table does not say, that takes a tenth to a fifth of a microsecond
each, if what is asked next is on its way from memory meanwhile; attribute by attribute, some six.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from . import _native

# Tensors of other types may be handles of others, and need not be what DLPack takes them for.
PLAIN = (torch.Tensor, torch.nn.Parameter)

_EXCHANGE_API = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # not in torch 2.6

columns = _native.columns  # of modules
entries_of = _native.entries_of  # of an optimizer's state
identities = _native.identities


class NotSurveyedError(Exception):
    """One is no plain tensor with memory and a version, or torch has no such table."""


class Survey(NamedTuple):
    """Of each tensor, in their order.

    Attributes:
        addresses: uint64, of the first element.
        versions: int64, `_version`.
        forms: device, dtype, shape and `requires_grad` of all of them; equal bytes, equal forms. Empty unless
            asked for.
        storages: so that memory stays when `tensor.data` is pointed elsewhere. Empty unless asked for.
    """

    addresses: npt.NDArray[np.uint64]
    versions: npt.NDArray[np.int64]
    forms: bytes
    storages: list[torch.UntypedStorage]


def survey(tensors: Sequence[torch.Tensor], *, forms: bool = False, storages: bool = False) -> Survey:
    """Look at plain tensors.

    Args:
        forms: also say what they are. All must be dense then: contiguous, not complex, and no negation of
            what is in memory.
        storages: hold them.

    Raises:
        NotSurveyedError: see there.
    """
    if _EXCHANGE_API is None:
        raise NotSurveyedError
    found, _ = _survey(tensors, forms=forms, storages=storages, inside=inside_agrees())
    return found


def _survey(
    tensors: Sequence[torch.Tensor], *, forms: bool = False, storages: bool = False, inside: bool
) -> tuple[Survey, bool]:
    """Also whether torch's C++ functions were asked."""
    try:
        found = _native.survey(list(tensors), PLAIN, _EXCHANGE_API, forms, storages, inside)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise NotSurveyedError from error
    if found is None:
        raise NotSurveyedError
    addresses, versions, seen, held, was_inside = found
    return Survey(addresses, versions, seen, held), was_inside


@functools.cache
def inside_agrees() -> bool:
    """Whether torch's C++ functions are found and say what its attributes say, of a few tensors on the host
    that differ in all that is asked. They are called only then. Found out once, on a thread of its own: what
    modes the caller is in does not matter there.
    """
    answers = [False]
    thread = threading.Thread(target=lambda: answers.append(_agrees()), name="asyncckpt-survey")
    try:
        thread.start()
    except RuntimeError:  # no thread can be had: whoever needs one says so, attributes need none
        return False
    thread.join()
    return answers[-1]


def _agrees() -> bool:
    try:
        tensors = _various()
        (inside, was_inside), (outside, _) = (
            _survey(tensors, forms=True, inside=inside) for inside in (True, False)
        )
        if not was_inside or inside.forms != outside.forms or (inside.versions != outside.versions).any():
            return False
        with torch.inference_mode():
            without_version = torch.zeros(1, device="cpu")
        negated = torch._neg_view(torch.zeros(1, device="cpu"))  # noqa: SLF001 -- there is no public name
        return _is_refused(without_version, RuntimeError) and _is_refused(negated, ValueError)
    except Exception:  # noqa: BLE001 -- whatever it is, the attributes can be asked
        return False


def _various() -> list[torch.Tensor]:
    """Versions of more than a byte, all kinds of `requires_grad`, in no step with each other."""
    leaves = [torch.zeros(number % 3, device="cpu") for number in range(12)]
    for number, leaf in enumerate(leaves):
        for _ in range(300 if number == 7 else number * number):
            leaf.add_(1)
        leaf.requires_grad_(number % 4 > 1)
    parameters = [torch.nn.Parameter(leaf.detach(), leaf.requires_grad) for leaf in leaves]
    return [*leaves, *parameters, *(leaf * 1 for leaf in leaves), *(leaf.detach() for leaf in leaves)]


def _is_refused(tensor: torch.Tensor, why: type[Exception]) -> bool:
    try:
        _survey([tensor], forms=True, inside=True)
    except NotSurveyedError as refusal:
        return isinstance(refusal.__cause__, why)
    return False


def is_among(few: Collection[int], addresses: npt.NDArray[np.uint64]) -> bool:
    """Whether one of a few addresses is among many."""
    wanted = np.array(sorted({*few} - {0}), dtype=np.uint64)
    if not len(wanted):
        return False
    places = np.searchsorted(wanted, addresses)  # `np.isin` would hash all of the many
    return bool((wanted[np.minimum(places, len(wanted) - 1)] == addresses).any())
