"""A plain dict of the user's, filled in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from .. import arrays
from ..errors import LeafError
from ..tree import Matching, StoredTensor, fits
from . import Stateful
from .spread import with_live_shards


class ValueSection:
    """A plain dict that the user handed over: on load, tensors and objects in it are filled in place, other
    values are replaced; so is a tensor of another form, unless it is trained, by one on the same device.
    Tensors are also looked for in dicts and lists inside it.

    CuPy arrays, also in dicts inside it, are saved as tensors and filled in place; one of another form does
    not fit. See `arrays` for what is ordered and where arrays are not looked for.
    """

    def __init__(self, values: dict[str, Any], name: str = "extra") -> None:
        self.values = values
        self._name = name
        self._array_devices: set[int] = set()  # of the last capture

    def capture(self) -> Any:
        self._array_devices = set()
        return {
            key: v.state_dict()
            if isinstance(v, Stateful)
            else arrays.as_tensors(f"{self._name}.{key}", v, self._array_devices)
            for key, v in self.values.items()
        }

    def hold_back_arrays(self) -> None:
        """See `TrainingState.hold_back_arrays`."""
        arrays.order_after_torch(self._array_devices)

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.missing += [f"{name}.{key}" for key in self.values if key not in stored]
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.values]
        in_place = _InPlace(matching)
        for key, value in stored.items():
            owner = self.values.get(key)
            if isinstance(owner, Stateful):
                value = with_live_shards(f"{name}.{key}", owner, value, matching)  # noqa: PLW2901
            else:
                value = in_place.visit(f"{name}.{key}", owner, value)  # noqa: PLW2901
            fresh = matching.fresh(f"{name}.{key}", value)
            if isinstance(owner, Stateful):
                matching.afterwards.append(lambda owner=owner, fresh=fresh: owner.load_state_dict(fresh))  # type: ignore[misc]
            else:
                matching.afterwards.append(lambda key=key, fresh=fresh: self.values.update({key: fresh}))  # type: ignore[misc]
        matching.afterwards.append(lambda: arrays.order_after_torch(in_place.used))


class _InPlace:
    """Puts live tensors and arrays into the places of stored ones, to be filled.

    Attributes:
        used: devices of the arrays.
    """

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self._seen: dict[int, Any] = {}  # stored containers, which may contain themselves
        self._made: dict[StoredTensor, torch.Tensor] = {}  # what is one tensor stays one
        self.used: set[int] = set()

    def visit(self, name: str, live: Any, stored: Any, *, arrays_too: bool = True) -> Any:
        """`stored` with what is live in it. `arrays_too`: here, arrays are saved as tensors."""
        if isinstance(live, torch.Tensor) and isinstance(stored, StoredTensor):
            if live.requires_grad or fits(live, stored):
                self._matching.into(name, stored, live.detach())
                return live
            if stored not in self._made:
                self._made[stored] = self._matching.fresh(name, stored, like=live)
            return self._made[stored]
        if arrays_too and arrays.is_array(live):
            self._fill(name, live, stored)
            return live
        if id(stored) in self._seen:
            return self._seen[id(stored)]
        if isinstance(live, dict) and type(stored) in (dict, OrderedDict):
            arrays_too = arrays_too and type(live) is dict and all(type(key) is str for key in live)
            result = self._seen[id(stored)] = type(stored)()
            for key, child in stored.items():
                result[key] = self.visit(f"{name}.{key}", live.get(key), child, arrays_too=arrays_too)
            return result
        if isinstance(live, list) and type(stored) is list:
            items: list[Any] = []
            self._seen[id(stored)] = items
            for index, child in enumerate(stored):
                one = live[index] if index < len(live) else None
                items.append(self.visit(f"{name}.{index}", one, child, arrays_too=False))
            return items
        return stored

    def _fill(self, name: str, array: Any, stored: Any) -> None:
        try:
            tensor = arrays.as_tensor(name, array)
        except LeafError as error:
            self._matching.differences.append(str(error))
        else:
            self._matching.into(name, stored, tensor)
            self.used.add(tensor.get_device())
