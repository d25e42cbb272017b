"""The tree inside `model_optim_rng.pt`, and back.

Keys as megatron/training/checkpointing.py (generate_state_dict) writes them. Optimizer state is numbered
as `torch.optim.Optimizer.state_dict` numbers it: by position, over all groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONTENT_KEY = "content_metadata"  # in common.pt: what the sharded state is like
COMMON_KEY = "common"  # in a branch of a tree that was read: what common.pt has of it
PLACES_KEY = "places"  # there too: keys of the generators, which say how the model was spread over ranks

_SHARDED = ("model", "optimizer", "rng_state")  # branches of format torch_dist
_OPTIMIZER_ITEM = re.compile(r"(chained_[0-9]+\.)?optimizer\.")

_CHECKPOINT_VERSION = 3.0
_MEGATRONS_OWN = ("checkpoint_version", "args", "num_floating_point_operations_so_far", "rerun_state_machine")

_NAMES = {"lr_scheduler": "opt_param_scheduler", "step": "iteration", "rng": "rng_state"}
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}
_RNG_NAMES = {
    "python": "random_rng_state",
    "numpy": "np_rng_state",
    "torch": "torch_rng_state",
    "cuda": "cuda_rng_state",
}


def to_megatron(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree under Megatron's keys. Moves references; copies nothing."""
    packed: dict[str, Any] = {"checkpoint_version": _CHECKPOINT_VERSION}
    for name, branch in tree.items():
        if name == "optimizer":
            packed[name] = _numbered(branch)
        elif name == "rng":
            packed["rng_state"] = [pack_rng(branch)]
        else:
            packed[_NAMES.get(name, name)] = branch
    return packed


def from_megatron(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, also for files that Megatron wrote; what has no place in our tree keeps its key."""
    tree: dict[str, Any] = {}
    for name, branch in packed.items():
        if name == "rng_state":
            tree["rng"] = unpack_rng(branch)
        elif name not in _MEGATRONS_OWN:
            tree[_OURS.get(name, name)] = branch
    return tree


def to_common(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What `common.pt` holds: of our tree, what is neither sharded nor a rank's own. Its branch "common" has
    keys of its own there."""
    packed = to_megatron({name: branch for name, branch in tree.items() if name not in (*_SHARDED, "common")})
    return {**packed, **tree.get("common", {})}


def sharded_in(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The branches of our tree whose leaves are `Boxed` and `Keyed`."""
    return {name: tree[name] for name in _SHARDED if name in tree}


def from_megatron_dist(common: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree of a checkpoint of format torch_dist: sharded branches are flat, by the keys of their items.

    Args:
        items: of all ranks.
    """
    described = common.get(CONTENT_KEY)
    tree = from_megatron({k: v for k, v in common.items() if k not in ("optimizer", CONTENT_KEY)})
    tree.update({name: {} for name in ("model", "rng")})
    if "optimizer" in common:
        tree["optimizer"] = {COMMON_KEY: common["optimizer"]}
    for key, item in items.items():
        if _OPTIMIZER_ITEM.match(key):
            tree.setdefault("optimizer", {})[key] = item
        else:
            tree["rng" if key.startswith("rng_state/") else "model"][key] = item
    if "optimizer" in tree:
        tree["optimizer"].update({CONTENT_KEY: described, PLACES_KEY: list(tree["rng"])})
    return tree


def _numbered(branch: Any) -> Any:
    """Optimizer state by position instead of by name; several optimizers one by one."""
    if not isinstance(branch, Mapping):
        return branch
    if "param_groups" not in branch or "state" not in branch:
        return {name: _numbered(child) for name, child in branch.items()}
    names = [name for group in branch["param_groups"] for name in group["params"]]
    position = {name: index for index, name in enumerate(names)}
    if not all(isinstance(name, str) for name in names):
        return branch  # not ours to number
    groups = [
        {**group, "params": [position[name] for name in group["params"]]} for group in branch["param_groups"]
    ]
    state = {position[name]: values for name, values in branch["state"].items()}
    return {"state": state, "param_groups": groups}


def pack_rng(states: Mapping[str, Any]) -> dict[str, Any]:
    """One of the dicts that `rng_state` lists."""
    packed = {theirs: states[ours] for ours, theirs in _RNG_NAMES.items() if ours in states}
    if "cuda" in states:  # Megatron keeps one device per rank
        packed["cuda_rng_state"] = states["cuda"][0] if len(states["cuda"]) == 1 else states["cuda"]
    return {**packed, "rng_tracker_states": states.get("tracker", {})}


def unpack_rng(branch: Any) -> dict[str, Any]:
    """The first of the dicts that `rng_state` lists, as our branch."""
    packed = branch[0] if isinstance(branch, list | tuple) and branch else branch
    if not isinstance(packed, Mapping):
        return {}
    states = {ours: packed[theirs] for ours, theirs in _RNG_NAMES.items() if theirs in packed}
    if "cuda" in states and not isinstance(states["cuda"], list):
        states["cuda"] = [states["cuda"]]
    if packed.get("rng_tracker_states"):
        states["tracker"] = packed["rng_tracker_states"]
    return states
