"""How the ranks of a run come together over a root: who owns it, what disks they see, what earlier runs left.

    first rank: root, lease -> incarnation -> all join: the disks that they see -> one run over one root

Where each node has a disk of its own, then also, on the first rank of each:

    lease -> what lies there -> what all nodes do about it -> published, abandoned or removed -> all are ready
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .commit import CheckpointRoot, new_incarnation, prepare_root
from .committer import HEARTBEAT_S
from .errors import CheckpointError, OptionError, RankError, RootError
from .filesystem import Filesystem, disk_of
from .layouts import Layout
from .lease import RootLease, owner_of
from .node_root import NodeRoot
from .nodes import Inventory, Nodes, Verdict, verdict
from .parts import Member
from .ranks import Ranks

Disks = Literal["shared", "node-local"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Meeting:
    """What came of it.

    Attributes:
        incarnation: of the run, the same on every rank.
        lease: where this rank publishes; else None.
    """

    incarnation: str
    root: CheckpointRoot
    lease: RootLease | None


def meet(
    path: Path,
    layout: Layout,
    ranks: Ranks,
    member: Member,
    *,
    disks: Disks,
    read_only: bool,
    undo: ExitStack,
) -> Meeting:
    """Begin a run over a root, together. What was begun is in `undo`, should the rest fail.

    Raises:
        RootError: the root cannot be used, or ranks that should share it do not; RootBusyError: another run
            owns it.
        RankError: another rank cannot begin, or does not come.
        OptionError: ranks do not say the same.
    """
    fs = Filesystem()
    leases: list[RootLease] = []

    def own(incarnation: str) -> None:
        prepare_root(path, fs)
        lease = RootLease.acquire(path, owner=incarnation, heartbeat_s=HEARTBEAT_S)
        undo.callback(lease.release)
        leases.append(lease)

    def begin() -> dict[str, Any]:  # on the first rank alone
        incarnation = new_incarnation()
        if not read_only:
            own(incarnation)
            if disks == "shared" or ranks.alone:
                CheckpointRoot(path, layout, fs, member.parts).sweep(incarnation)
        return {"incarnation": incarnation, "disks": disks, "disk": disk_of(path)}

    begun = ranks.begin(begin)
    incarnation: str = begun["incarnation"]
    if not ranks.alone:
        _join(path, ranks, begun, disks, None if read_only else fs)
    if disks == "node-local" and not ranks.alone:
        ranks.nodes = Nodes.by_disk(ranks.all_say(disk_of(path)))
    if not ranks.nodes.are_several:
        root = CheckpointRoot(path, layout, fs, member.parts)
        if leases and disks == "node-local":
            root.sweep(incarnation)
        return Meeting(incarnation, root, *leases or (None,))
    leads_elsewhere = ranks.leads and not ranks.is_first and not read_only
    _together(ranks, lambda: own(incarnation) if leads_elsewhere else None)
    node_root = NodeRoot(path, layout, fs, member.parts, ranks.nodes.of(ranks.rank))
    if not read_only:
        _recover(node_root, ranks, incarnation)
    return Meeting(incarnation, node_root, *leases or (None,))


def _join(path: Path, ranks: Ranks, begun: dict[str, Any], disks: Disks, fs: Filesystem | None) -> None:
    """All see the root that they should, or none goes on."""
    problem: CheckpointError | None = None
    if begun["disks"] != disks:
        problem = OptionError(f"disks: {disks!r} here, {begun['disks']!r} on {ranks.called(0)}")
    elif fs is not None and not ranks.is_first and disks == "node-local":
        try:
            prepare_root(path, fs)
        except RootError as error:
            problem = error
        if disk_of(path) != begun["disk"] and owner_of(path) == begun["incarnation"]:
            problem = RootError(
                f'{path} is one directory that several machines share; use disks="shared", the default'
            )
    elif fs is not None and not ranks.is_first and owner_of(path) != begun["incarnation"]:
        problem = RootError(
            f"{path} is not the directory that {ranks.called(0)} sees there; ranks need a filesystem that "
            f'they share, or disks="node-local"'
        )
    try:
        ranks.join(str(problem or ""))
    except RankError as error:
        if problem is not None and str(problem) in str(error):  # else rank 0 has left meanwhile
            raise problem from None
        raise


def _recover(root: NodeRoot, ranks: Ranks, incarnation: str) -> None:
    """What earlier runs left on the nodes becomes the same on all of them."""
    found = _together(ranks, lambda: root.inventory().to_bytes() if ranks.leads else b"")

    def decide(said: list[bytes]) -> dict[str, Any]:
        return verdict([Inventory.from_bytes(one) for one in said]).to_fields()

    agreed = Verdict.from_fields(ranks.consult(found, ranks.nodes.leaders, decide))
    _together(ranks, lambda: root.recover(agreed, incarnation) if ranks.leads else None)


def _together(ranks: Ranks, act: Callable[[], _Result]) -> _Result:
    """Do this rank's part, and return once all ranks did theirs.

    Raises what `act` raised; RankError if another rank failed.
    """
    try:
        result = act()
    except CheckpointError as error:
        ranks.all_say(str(error))
        raise
    said = ranks.all_say("")
    for rank, word in enumerate(said):
        if word:
            raise RankError(f"{ranks.called(rank)} cannot take part: {word}")
    return result
