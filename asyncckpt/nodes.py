"""Which ranks share a disk; and where there are several, what becomes of a step that some of them have.

A step on node-local disks is prepared on each node, and then published on each, the first rank's node first:

    found at start, over all nodes           so it is                                 and
    ---------------------------------------  ---------------------------------------  ------------------------
    published on all                         whole                                    stays
    published on some, prepared on the rest  whole: the first rank's node decided so  published on the rest
    published on some, absent on others      lost with a disk, or half deleted        never loaded; see below
    prepared only, all its nodes are here    undecided: nobody was told it is saved   removed
    prepared only, nodes of it are missing,  perhaps published there                  left as it is
    or some node has it from another place
    abandoned on some (see `commit`)         of a timeline that was left              abandoned on the rest

What is published on some nodes alone is not loaded, and does not count among the steps that retention keeps;
it goes with the first step that retention deletes from after it.

Pure: no I/O, no communication.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Node:
    """A node with a disk of its own, seen by one of the participants on it.

    Attributes:
        place: that participant's; see `parts`.
        places: of all on it, ascending.
        count: of such nodes.
    """

    place: int
    places: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Nodes:
    """The participants of a step by the disks that they write to.

    Attributes:
        groups: places (see `parts`) that share a disk, ascending; by the first of each.
    """

    groups: tuple[tuple[int, ...], ...]
    _node_of: Mapping[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        node_of = {place: node for node, group in enumerate(self.groups) for place in group}
        object.__setattr__(self, "_node_of", node_of)

    @classmethod
    def one(cls, world_size: int) -> Nodes:
        """Where all share one filesystem."""
        return cls((tuple(range(world_size)),))

    @classmethod
    def by_disk(cls, disks: Sequence[str]) -> Nodes:
        """From what each participant, by its place, says its disk is."""
        groups: dict[str, list[int]] = {}
        for place, disk in enumerate(disks):
            groups.setdefault(disk, []).append(place)
        return cls(tuple(tuple(group) for group in groups.values()))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def are_several(self) -> bool:
        """Whether there is more than one disk."""
        return len(self.groups) > 1

    def of(self, place: int) -> Node:
        """A participant's."""
        return Node(place, self.groups[self._node_of[place]], len(self.groups))

    @property
    def leaders(self) -> tuple[int, ...]:
        """The first of each node: it prepares, publishes and cleans up there. The first leads all."""
        return tuple(group[0] for group in self.groups)


@dataclass(frozen=True)
class Found:
    """A save, as one node has it.

    Attributes:
        step, ordinal: see `Manifest`.
        nodes: how many have a part of it; 0 for one that was not saved to node-local disks.
    """

    step: int
    ordinal: int
    nodes: int


@dataclass(frozen=True)
class Inventory:
    """What lies on one node, by attempt.

    Attributes:
        published: visible, and as whole as its manifest tells.
        prepared: hidden; a rename makes it visible.
        abandoned: left behind by a load of an older step.
        misplaced: published or prepared by other ranks than those that are on this node now.
        foreign: steps that other tools wrote, by number.
        ever: whether anything was ever finished there, by whatever tool.
    """

    published: Mapping[str, Found]
    prepared: Mapping[str, Found]
    abandoned: Mapping[str, Found]
    misplaced: Mapping[str, Found]
    foreign: tuple[int, ...]
    ever: bool

    def has(self, step: int, attempt: str) -> bool:
        """Whether a step can be loaded from here; the attempt of other tools' is ""."""
        return attempt in self.published if attempt else step in self.foreign

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Inventory:
        fields = json.loads(data)
        kinds = ("published", "prepared", "abandoned", "misplaced")
        found = {kind: {a: Found(**each) for a, each in fields[kind].items()} for kind in kinds}
        return Inventory(**found, foreign=tuple(fields["foreign"]), ever=fields["ever"])


@dataclass(frozen=True)
class Verdict:
    """What all nodes do before anything new is saved; attempts, in the order of their commits.

    Attributes:
        forward: to be published where they are prepared.
        abandon: to be hidden where they are visible.
        spared: prepared, and not to be removed.
        partial: visible on some nodes alone, once all this is done.
        newest: the last committed of those that all have, once all this is done; "" if there is none.
        ordinal: the largest on any node.
    """

    forward: tuple[str, ...]
    abandon: tuple[str, ...]
    spared: tuple[str, ...]
    partial: tuple[str, ...]
    newest: str
    ordinal: int

    def to_fields(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Verdict:
        single = {"newest", "ordinal"}
        attempts = {name: tuple(value) for name, value in fields.items() if name not in single}
        return Verdict(**attempts, newest=fields["newest"], ordinal=fields["ordinal"])


def verdict(inventories: Sequence[Inventory]) -> Verdict:
    """What becomes of what nodes have; see the table."""
    known: dict[str, Found] = {}
    for inventory in inventories:
        for found in (inventory.published, inventory.prepared, inventory.abandoned, inventory.misplaced):
            known.update(found)

    def some(attempt: str, kind: str) -> bool:
        return any(attempt in getattr(inventory, kind) for inventory in inventories)

    def everywhere(attempt: str, *kinds: str) -> bool:
        return all(any(attempt in getattr(one, kind) for kind in kinds) for one in inventories)

    in_order = sorted(known, key=lambda attempt: (known[attempt].ordinal, attempt))
    abandon = [a for a in in_order if some(a, "abandoned") and some(a, "published")]
    published = [a for a in in_order if some(a, "published") and a not in abandon]
    whole = [a for a in published if everywhere(a, "published", "prepared")]
    newest = whole[-1] if whole else ""
    spared = [
        a
        for a in in_order
        if some(a, "prepared")
        and a not in whole
        and (known[a].nodes > len(inventories) or some(a, "misplaced"))
        and not (newest and known[a].ordinal < known[newest].ordinal)
    ]
    forward = [a for a in published if a in whole and some(a, "prepared")]
    partial = [a for a in published if a not in whole]
    # The run that made these would have abandoned what it could not load and saved again.
    in_the_way = [
        a
        for a in partial
        if any(known[a].ordinal < known[f].ordinal and known[a].step >= known[f].step for f in forward)
    ]
    return Verdict(
        forward=tuple(forward),
        abandon=(*abandon, *in_the_way),
        spared=tuple(spared),
        partial=tuple(a for a in partial if a not in in_the_way),
        newest=newest,
        ordinal=max((found.ordinal for found in known.values()), default=0),
    )


def numbered(places: Iterable[int]) -> str:
    """Ranks in few letters: "0-3, 8"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
