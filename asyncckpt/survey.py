"""What many tensors are in memory, and what is in many dictionaries, without a call of python for each.

Thousands of tensors are asked thrice in every save: where they are, whether they were written to, and whether
they are what they were at the last save. By DLPack's table of C functions, which torch hangs on its tensors,
that takes a fifth of a microsecond each, if what is asked next is on its way from memory meanwhile; attribute
by attribute, some six.
"""

from __future__ import annotations

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
    try:
        found = _native.survey(list(tensors), PLAIN, _EXCHANGE_API, forms, storages)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise NotSurveyedError from error
    if found is None:
        raise NotSurveyedError
    return Survey(*found)


def is_among(few: Collection[int], addresses: npt.NDArray[np.uint64]) -> bool:
    """Whether one of a few addresses is among many."""
    wanted = np.array(sorted({*few} - {0}), dtype=np.uint64)
    if not len(wanted):
        return False
    places = np.searchsorted(wanted, addresses)  # `np.isin` would hash all of the many
    return bool((wanted[np.minimum(places, len(wanted) - 1)] == addresses).any())
