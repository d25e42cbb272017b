"""What ranks say of a save: each a ballot, the first one an outcome; and whether ballots agree.

Pure: no I/O, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .errors import RankError
from .formats.manifest import FragmentRef
from .parts import Parts


@dataclass(frozen=True)
class Ballot:
    """What one rank has to say of a save.

    Attributes:
        rank, step: whose it is, and which step that rank saves.
        error: why its part failed; None if all of it is fsynced and nothing was torn.
        fragment: of what it wrote.
        groups: for each set of ranks that hold the same tensors, a digest of what they are to this rank.
        layout: digest of where its items lie; see `Ranks.say_layout`.
        pickles: CRC-32 of each python leaf that rank 0 saves for all.
        tree: digest of what the leaves are.
    """

    rank: int
    step: int
    error: str | None = None
    fragment: FragmentRef | None = None
    groups: tuple[tuple[str, str], ...] = ()
    layout: str = ""
    pickles: tuple[int, ...] = ()
    tree: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Ballot:
        fields = json.loads(data)
        fragment = fields.pop("fragment")
        groups = tuple((key, digest) for key, digest in fields.pop("groups"))
        pickles = tuple(fields.pop("pickles"))
        ref = FragmentRef(**fragment) if fragment is not None else None
        return Ballot(**fields, fragment=ref, groups=groups, pickles=pickles)


@dataclass(frozen=True)
class Outcome:
    """What rank 0 made of it.

    Attributes:
        error: None if the step is durable.
        is_published: on the first rank's node, though an error came after that: other nodes will follow.
    """

    error: str | None = None
    is_published: bool = False

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Outcome:
        return Outcome(**json.loads(data))


def digest(value: bytes) -> str:
    """A short name for bytes that must be the same elsewhere."""
    return hashlib.sha256(value).hexdigest()[:16]


def check_alike(ballots: Sequence[Ballot], parts: Parts) -> None:
    """Raise RankError unless all ranks save the same step, and those of a part the same structure."""
    first = ballots[0]
    for ballot in ballots:
        if ballot.step != first.step:
            here, there = parts.called(ballot.rank), parts.called(first.rank)
            raise RankError(f"{here} saves step {ballot.step} where {there} saves step {first.step}")
    for part in parts.world_sizes:
        known: dict[str, tuple[int, str]] = {}
        for ballot in (ballots[place] for place in parts.places(part)):
            for group, name in ballot.groups:
                rank, expected = known.setdefault(group, (ballot.rank, name))
                if name != expected:
                    raise RankError(
                        f"the state of {parts.called(ballot.rank)} has another structure than that of "
                        f"{parts.called(rank)}: what they hold both must have the same names, shapes and "
                        f"dtypes, in the same order"
                    )
