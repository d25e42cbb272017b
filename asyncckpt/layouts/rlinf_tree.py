"""The keys of RLinf's DCP checkpoints, and back.

As rlinf/hybrid_engines/fsdp/strategy/checkpoint.py has them: `fsdp_checkpoint.model.<fqn>`,
`.optimizers.state.<fqn>.exp_avg`, `.optimizers.param_groups.0.lr`, `.lr_schedulers.0.<key>`,
`.fsdp_version`, `.rng.{cpu,cuda,numpy,random}`. There is one set of keys for generators, so RLinf has one
rank's for all; here they are the first rank's too, and each rank's own are in a file beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import LeafError, LoadError

_ROOT = "fsdp_checkpoint"
_VERSION = "fsdp2"  # what RLinf compares with the live model; FSDP1 hands out no DTensors
_NAMES = {"model": "model", "optimizer": "optimizers", "rng": "rng", "fsdp_version": "fsdp_version"}
_RNG_NAMES = {"torch": "cpu", "numpy": "numpy", "python": "random", "cuda": "cuda"}


def shared_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the ranks of a part have together, still under our names.

    Raises:
        LeafError: RLinf has no place for it.
    """
    for name in ("optimizer", "lr_scheduler"):
        branch = tree.get(name)
        inner = branch.values() if isinstance(branch, Mapping) else ()
        if name == "optimizer" and branch is not None and "param_groups" not in branch:
            raise LeafError(f"{name}: RLinf's checkpoints have one per part; hand over that one, by itself")
        if name == "lr_scheduler" and inner and all(isinstance(child, Mapping) for child in inner):
            raise LeafError(f"{name}: hand over one per part here, by itself")
    shared = {name: tree[name] for name in ("model", "optimizer", "lr_scheduler", "extra") if name in tree}
    shared["fsdp_version"] = _VERSION
    states = tree.get("rng")
    if states is not None:
        shared["rng"] = {theirs: states[ours] for ours, theirs in _RNG_NAMES.items() if ours in states}
        if "cuda" in states:  # RLinf keeps one device per rank
            index = torch.cuda.current_device() if len(states["cuda"]) > 1 else 0
            shared["rng"]["cuda"] = states["cuda"][index]
    return shared


def stored_path(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where RLinf keeps a leaf of `shared_tree`; what it does not know stays beside its own."""
    section, *rest = path
    if section == "lr_scheduler":
        return (_ROOT, "lr_schedulers", 0, *rest)
    return (_ROOT, _NAMES[str(section)], *rest) if section in _NAMES else path


def from_rlinf(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree, of a checkpoint that RLinf or we have written.

    Raises:
        LoadError: it is neither.
    """
    theirs = stored.get(_ROOT)
    if not isinstance(theirs, Mapping):
        raise LoadError(f"no {_ROOT} in it: not a checkpoint of RLinf's FSDP backend")
    tree = {name: branch for name, branch in stored.items() if name != _ROOT}
    optimizer = theirs.get("optimizers", theirs.get("optim"))
    schedulers = theirs.get("lr_schedulers")
    if "model" in theirs:
        tree["model"] = theirs["model"]
    if optimizer is not None:
        tree["optimizer"] = optimizer
    if isinstance(schedulers, list) and len(schedulers) == 1:
        tree["lr_scheduler"] = schedulers[0]
    elif schedulers:
        raise LoadError(f"it has {len(schedulers)} schedulers, and only one can be loaded")
    rng = theirs.get("rng")
    if isinstance(rng, Mapping):
        tree["rng"] = {ours: rng[name] for ours, name in _RNG_NAMES.items() if name in rng}
        if "cuda" in tree["rng"]:
            tree["rng"]["cuda"] = [tree["rng"]["cuda"]]
    return tree
