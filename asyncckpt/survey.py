"""What many tensors are in memory, and what is in many dictionaries, without a call of python for each.

Thousands of tensors are asked twice in every save: where they are, whether they were written to, and whether
they are what they were at the last save. By DLPack's table of C functions, which torch hangs on its tensors,
and by torch's C++ functions for what the table does not say, that takes a tenth to a fifth of a microsecond
each, if what is asked next is on its way from memory meanwhile; attribute by attribute, some six.
"""

from __future__ import annotations

import functools
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
    return _survey(tensors, forms, storages, inside_agrees())


def _survey(tensors: Sequence[torch.Tensor], forms: bool, storages: bool, inside: bool) -> Survey:
    try:
        found = _native.survey(list(tensors), PLAIN, _EXCHANGE_API, forms, storages, inside)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise NotSurveyedError from error
    if found is None:
        raise NotSurveyedError
    return Survey(*found)


@functools.cache
def inside_agrees() -> bool:
    """Whether torch's own C++ functions, found by their names, say what its attributes say: of tensors with
    every answer that there is, once. They are called past python only then."""
    with torch.no_grad(), torch.inference_mode(False):
        tensors: list[torch.Tensor] = []
        for number in range(16):
            one = torch.zeros(number % 3 + 1, device="cpu")
            for _ in range(number):
                one.add_(1)
            one.requires_grad_(number % 2 == 1)
            tensors.append(torch.nn.Parameter(one, one.requires_grad) if number % 4 > 1 else one)
        negated = torch._neg_view(torch.zeros(2, device="cpu"))  # noqa: SLF001 -- there is no public name
    try:
        inside, outside = (_survey(tensors, True, False, inside) for inside in (True, False))
    except NotSurveyedError:
        return False
    if inside.forms != outside.forms or (inside.versions != outside.versions).any():
        return False
    try:
        _survey([*tensors, negated], True, False, True)
    except NotSurveyedError:
        return True
    return False


def is_among(few: Collection[int], addresses: npt.NDArray[np.uint64]) -> bool:
    """Whether one of a few addresses is among many."""
    wanted = np.array(sorted({*few} - {0}), dtype=np.uint64)
    if not len(wanted):
        return False
    places = np.searchsorted(wanted, addresses)  # `np.isin` would hash all of the many
    return bool((wanted[np.minimum(places, len(wanted) - 1)] == addresses).any())
