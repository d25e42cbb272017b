"""AsyncCheckpointer: the story of a save and of a load, top to bottom.

save():       state -> capture -> plan -> pack -> snapshot  on the caller's thread, no I/O to wait for
the engine:   copies, checksums, writes, syncs              native threads
the fence:    nothing torn? all copied? then training may go on
committer:    written and fenced -> manifest -> rename -> tracker -> retention
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

from . import memory, options
from .capture import Captured, Reserve, capture, capture_hidden
from .commit import attempt_id
from .committer import Committer
from .errors import (
    CaptureError,
    CheckpointError,
    ClosedError,
    DeviceError,
    ForkedError,
    LoadError,
    OptionError,
    RootError,
    SaveError,
    SaveTimeoutError,
    StepExistsError,
    WriteError,
)
from .failures import Failures
from .fence import StepFence
from .formats.manifest import checked_metadata
from .garbage import no_garbage_collection
from .inflight import ABORT_S, Deadline, PhaseObserver, Save, SaveHandle
from .layouts import layout_named
from .layouts.megatron import ModelRank
from .lease import RootLease
from .loader import Loader, Resume
from .meeting import Disks, meet
from .packing import Packer
from .parts import Member
from .plan import Planned
from .planners import planner_for
from .ranks import member_of, ranks_of
from .snapshot import Stager
from .state import NOTHING, Look, TrainingState, named_models
from .tree import StateTree

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_PROGRESS_INTERVAL_S = 0.1
_EXIT_UNREPORTED = 70  # EX_SOFTWARE: a failed save that nobody heard of must not look like success


class AsyncCheckpointer:
    """Saves training state in the background; resumes from the newest step that is whole.

    Args:
        root: directory of the steps; made if absent. One live run owns it.
        model: an nn.Module, or anything with state_dict() and load_state_dict(); or the chunks of one, as a
            sequence (they become model0, model1, ...).
        optimizer, lr_scheduler: the same; or several, as a sequence or mapping.
        dataloader: anything with state_dict() and load_state_dict().
        extra: the same; or a dict of plain values, tensors, CuPy arrays and such objects. load fills
            tensors, arrays and objects in place, and replaces the other values in the dict.
        per_rank: the same, of what is a rank's own where there are several; generators and the dataloader
            are kept per rank anyway. All else is taken to be the same on every rank, or a DTensor.
        layout: "dcp" (`step-50/`, read by torch.distributed.checkpoint), "megatron"
            (`iter_0000050/mp_rank_00/model_optim_rng.pt` and a tracker), "rlinf-fsdp" or "rlinf-megatron"
            (`global_step_50/`, a directory per part; see `integrations.rlinf`). "megatron-dist" is for
            `integrations.megatron` alone.
        host_memory: bytes that staging may take, all in all. A state that is larger streams through;
            then the step fence waits for the disk. Default: see `memory.default_host_memory_bytes`. With
            guard="full", checksums of what is on CUDA devices take 8 MiB more, once for the process.
        writers: threads that write to disk.
        writers_priority: "normal": a little below training's. "low": nice 19 and the lowest best-effort I/O
            priority (which only some I/O schedulers heed); a save may then take long on a busy machine.
        keep_last: steps to keep, by order of commit; None keeps all. To delete a step takes the disk's time
            as well, noticeably so on filesystems that are mounted with `discard`.
        keep_every: also keep steps divisible by this.
        on_error: "raise": a failed save surfaces at the next save(), at wait() and close(). "warn": it
            is logged, and the next save tries again.
        guard: "versions" or "full"; see `snapshot.Guard` for what versions do not see. "full" reads the
            state once more inside save().
        fencing: "hooks": optimizer steps fence by themselves. "manual": the caller sees to it, with
            `fence()` or `fenced()`, before anything changes the state.
        pack: "auto": where a CUDA device has hundreds of tensors of at most 32 KiB in a row, and CuPy is
            installed, saves try whether it is faster to gather them by a kernel first; the faster way
            stays. "always": do so untried. "never", and with guard="full": don't. Takes at most 64 MiB of
            the device until they are copied.
        max_in_flight: saves not yet durable at a time.
        when_busy: what save() does beyond that: "wait" (it shows in `blocked_s`) or "skip" (the handle's
            report says skipped, and a warning is logged).
        fence_timeout_s: after this long in the fence, the save is given up, not training. save() waits as
            long for room before it raises, and close() for a device that hangs.
        save_rng: capture and restore python's, numpy's and torch's generators.
        read_only: only load: no lease, no writes; other runs may own the root.
        store, rank, world_size: in what, and among whom, ranks agree. Default: torch.distributed's own,
            if its process group was initialised; world_size=1 makes this rank save by itself. Every rank
            constructs its checkpointer, and calls save() and load() in the same order, with the same steps.
        parts: where several groups of processes write one step: the ranks of each, the same everywhere; the
            first rank of the first publishes. Each part's files lie in a directory of its name.
        part: which of them this process belongs to. `rank` and `world_size` are then those within it, and
            `store` must be one that all participants reach.
        rank_timeout_s: a rank that shows no sign of life for so long is taken for dead.
        model_rank: which part of the model this rank has, in layout "megatron" where there are several.
        disks: "shared": all ranks see one root. "node-local": the root is on each node's own disk, under the
            same path; each keeps what its ranks hold, and a step counts once it is on all. Any layout but
            "megatron-dist". To resume from it, each rank must be on the node where it saved.
        on_phase: called with (step, phase) as each phase is reached, on whatever thread reaches it.

    One thread trains: it calls save(), fence(), load() and steps the optimizers. Everything that changes
    the state other than through a torch optimizer needs `fence()` first.

    Raises:
        RootError: the root is a file or not writable; RootBusyError: another live run owns it.
        OptionError: an option makes no sense.
        DeviceError: the state is on a CUDA device, and there is no driver, or it refuses.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        per_rank: Any = None,
        layout: str = "dcp",
        host_memory: int | None = None,
        writers: int = 4,
        writers_priority: Literal["normal", "low"] = "normal",
        keep_last: int | None = None,
        keep_every: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        guard: Literal["versions", "full"] = "versions",
        fencing: Literal["hooks", "manual"] = "hooks",
        pack: Literal["auto", "always", "never"] = "auto",
        max_in_flight: int = 2,
        when_busy: Literal["wait", "skip"] = "wait",
        fence_timeout_s: float = 1800.0,
        save_rng: bool = True,
        read_only: bool = False,
        store: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        part: str | None = None,
        parts: Mapping[str, int] | None = None,
        rank_timeout_s: float = 60.0,
        model_rank: ModelRank | None = None,
        disks: Disks = "shared",
        on_phase: PhaseObserver | None = None,
    ) -> None:
        options.check_choice("on_error", on_error, ("raise", "warn"))
        options.check_choice("guard", guard, ("versions", "full"))
        options.check_choice("fencing", fencing, ("hooks", "manual"))
        options.check_choice("pack", pack, ("auto", "always", "never"))
        options.check_choice("writers_priority", writers_priority, ("normal", "low"))
        options.check_choice("when_busy", when_busy, ("wait", "skip"))
        options.check_choice("disks", disks, ("shared", "node-local"))
        options.check_positive(
            writers=writers, max_in_flight=max_in_flight, keep_last=keep_last, keep_every=keep_every
        )
        host_memory = options.as_host_memory(host_memory)
        fence_timeout_s = options.as_timeout("fence_timeout_s", fence_timeout_s)
        if writers > options.WRITERS_MAX:
            raise OptionError(f"writers: at most {options.WRITERS_MAX}, got {writers}")
        self._state = TrainingState(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dataloader=dataloader,
            extra=extra,
            per_rank=per_rank,
            rng=save_rng,
        )
        member, store = member_of(store, rank, world_size, part, parts)
        self._part = member.part
        place = layout_named(layout).place(0, member.part)  # refuse wrong names before anything is written
        if disks == "node-local" and place.format == "megatron-dist":
            raise OptionError(
                "disks: on node-local ones, format torch_dist is not saved: of what ranks have alike, each "
                "node would need its own; use layout 'dcp' or 'megatron'"
            )
        self._on_error = on_error
        self._max_in_flight = max_in_flight
        self._when_busy = when_busy
        self._fence_timeout_s = fence_timeout_s
        self._on_phase = on_phase
        self._fences_by_hand = self._fences_replays = fencing == "manual"
        self._pid = os.getpid()
        self._closed = False
        self._calls = 0  # of save()
        self._failures = Failures(quiet=on_error == "warn")
        self._lock = threading.RLock()  # optimizers may step on autograd's threads

        self._lease: RootLease | None = None
        self._committer: Committer | None = None
        path = Path(os.fsdecode(root)).absolute()
        with ExitStack() as undo:  # what was begun, should the rest fail
            self._ranks = ranks_of(
                member, store, str(path), timeout_s=fence_timeout_s, silence_s=rank_timeout_s
            )
            undo.callback(self._ranks.close)
            if not self._ranks.alone and when_busy == "skip":
                raise OptionError('when_busy: several ranks would not skip the same saves; use "wait"')
            planner = planner_for(place.format, member.rank, member.world_size, model_rank)
            met = meet(
                path,
                layout_named(layout),
                self._ranks,
                member,
                disks=disks,
                read_only=read_only,
                undo=undo,
            )
            self._incarnation, self._root, self._lease = met.incarnation, met.root, met.lease
            if self._ranks.nodes.are_several:
                here = self._ranks.here(member.part)
                model_rank = self._on_each_node(member, model_rank)
                planner = planner_for(place.format, member.rank, member.world_size, model_rank, here)
            self._loader = Loader(self._root, self._state, self._ranks, member, model_rank)
            if read_only:
                undo.pop_all()
                return
            if host_memory is None:
                host_memory = memory.default_host_memory_bytes(self._state.modules(), optimizer is not None)
            self._planner = planner
            # Where every byte is compared, a write that nobody fenced must be seen, packed or not.
            self._packer = Packer("never" if guard == "full" else pack)
            self._stager = Stager(
                host_memory,
                writers=writers,
                full_guard=guard == "full",
                yielding=writers_priority == "low",
            )
            undo.callback(self._stager.close)
            self._stager.use_devices(self._state.devices())
            # Whoever wraps a model may have compiled it, and then hears of no hooks inside.
            outermost = [one for one in named_models(model).values() if isinstance(one, torch.nn.Module)]
            self._fence = StepFence(
                fence=self._fence_before_change,
                before_captured=self._fence_capture,
                at_risk=self._at_risk,
                optimizers=self._state.optimizers,
                models=outermost,
                used=self._state.devices(),
            )
            undo.callback(self._fence.remove)
            self._committer = Committer(
                self._root,
                self._lease,
                (keep_last, keep_every),
                self._failures.note,
                fence_timeout_s,
                self._ranks,
                member,
                rank_timeout_s,
            )
            undo.pop_all()
        atexit.register(self._at_exit)

    def _on_each_node(self, member: Member, model_rank: ModelRank | None) -> ModelRank | None:
        """Of the ranks on a node that have the same part of a model, the first writes it."""
        said = self._ranks.all_say(model_rank.directory if model_rank is not None else "")
        if model_rank is None:
            return None
        places = self._ranks.parts.places(member.part)
        first = next(
            rank for rank in self._ranks.here(member.part) if said[places[rank]] == model_rank.directory
        )
        return replace(model_rank, writes_model=first == member.rank)

    # -- saving

    def save(self, step: int, *, metadata: Mapping[str, Any] | None = None) -> SaveHandle:
        """Save the state as it is now; returns as soon as that is certain to succeed or be heard of.

        On CUDA "now" is when this thread's current streams have done what they have, and the streams on
        which optimizers stepped. Work on other streams must be ordered before one of these by the caller.

        Args:
            step: greater than every step of this timeline. After loading an older step, the steps above
                that one belong to another timeline: they give way when the first new step commits.
            metadata: anything JSON; comes back as `Resume.metadata`.

        Raises:
            OptionError: metadata is not JSON, or step is no int.
            StepError: negative or not greater; StepExistsError: already there.
            LeafError: a leaf cannot be saved; it is named.
            SaveError: an *earlier* save failed, and nobody was told yet. This one was not begun. Of several
                ranks, all raise at the same call: what fails, even at once, surfaces `max_in_flight` calls
                later or at wait(); errors of the program alone (LeafError, StepError, ...) come at once too.
            LoadError: the last load failed, so the live state is not to be trusted.
            CaptureError: a CUDA graph is being captured, or one with an optimizer's step in it would be
                replayed without a fence; see `fenced`.
            ClosedError, ForkedError.
        """
        self._check_usable()
        self._check_capture()
        step = options.as_step(step)
        if self._committer is None:
            raise RootError("this checkpointer is read_only")
        with self._lock:
            self._check_usable()  # another thread may have closed it meanwhile
            self._calls += 1  # whatever comes of it: the same call has the same number on every rank
            if self._loader.must_load is not None:
                raise LoadError(f"save() is refused until a load succeeds: {self._loader.must_load}")
            save = Save(step, self._on_phase, self._calls)
            self._decide_released()
            heard = self._heard_everywhere(save)
            try:
                self._await_calls(heard)
            except SaveTimeoutError as error:
                self._abstain(save, error, self._committer)
                raise
            self._failures.raise_due(heard)
            try:
                self._check_step(save.step)
                if not self._make_room(save):
                    return SaveHandle(save, self._settle)
                self._failures.raise_due(heard)
                save.metadata = checked_metadata(metadata or {})
                with no_garbage_collection():
                    self._begin(save, self._committer)
            except BaseException as error:
                self._abstain(save, error, self._committer)
                # What happens to one rank alone waits its turn where there are others; see _heard_everywhere.
                waits = self._on_error == "warn" or not self._ranks.alone
                if not waits or not isinstance(error, (WriteError, DeviceError)):
                    raise
                if self._ranks.alone:
                    save.fail(error)
                    self._failures.note(save)
                    save.finish()
            finally:
                save.report.blocked_s += save.elapsed_s()
        return SaveHandle(save, self._settle)

    def _heard_everywhere(self, save: Save) -> int | None:
        """The last call of save() whose outcome every rank knows by now; None: whatever is known here.

        What one rank knows a moment before another must not be raised there: the other would go on into a
        collective and wait.
        """
        return None if self._ranks.alone else save.call - self._max_in_flight

    def _abstain(self, save: Save, error: BaseException, committer: Committer) -> None:
        """The other ranks wait for what this one has to say of its save, in the order of all saves."""
        if not self._ranks.alone and save.attempt is None:
            failure = (
                error if isinstance(error, CheckpointError) else SaveError(f"step {save.step}: {error!r}")
            )
            save.refused = failure
            committer.take(save)

    def _begin(self, save: Save, committer: Committer) -> None:
        self._order_after_steps()
        captured, planned, reserve = self._capture(save)
        self._fence.note_streams(planned.used_devices())
        if captured.forward_changes:
            self._fence.before_forward()
        save.report.nbytes = planned.plan.nbytes
        save.report.captured_nbytes = reserve.host_nbytes + reserve.device_nbytes
        save.report.captured_on_devices_nbytes = reserve.device_nbytes
        save.report.pickled_nbytes = planned.plan.pickled_nbytes
        if planned.replanned:
            for name, kind in planned.plan.untrusted:
                _log.warning("%s holds a %s: loading it will need trusted=True", name, kind)
        save.report.replanned = planned.replanned
        place = self._root.layout.place(save.step, self._part)
        attempt = self._root.begin(
            save.step,
            attempt_id(self._incarnation, save.call),
            {place.path(directory) for directory in planned.plan.directories()},
            base=place.base,
            shared=not self._ranks.alone,
        )
        try:
            save.attempt = attempt
            packing = self._packer.pack(planned)
            save.report.packed, save.report.pack_s = packing.tensors, packing.seconds
            save.sample = packing.sample
            save.submitting_s = save.elapsed_s()
            steady = None if captured.tree.is_whole else captured.tree.steady
            save.snapshot = self._stager.snapshot(packing.planned, captured.live, attempt.files, steady)
            self._state.hold_back_arrays()  # until what was copied inside save() is copied
            save.mark("submitted")
            committer.take(save)
        except BaseException:
            if save.snapshot is not None:  # interrupted: nobody else will end it
                save.snapshot.give_up(min(self._fence_timeout_s, ABORT_S))
            save.snapshot = save.attempt = None
            if self._ranks.is_first:
                self._root.discard(attempt)
            raise

    def _capture(self, save: Save) -> tuple[Captured, Planned, Reserve]:
        """What is saved, and its plan: the last one, if what training changes in place is what it was."""
        look = self._state.look() if self._planner.remembers else NOTHING
        is_known = look.steady is not None and self._planner.knows(look.steady.structure)
        tree = self._state.capture(save.step, look, whole=not is_known)
        save.report.state_dict_s = dict(self._state.capture_s)
        captured, reserve = self._captured(tree, look)
        save.mark("captured")
        planned = self._planner.plan_again(captured.tree) if is_known else None
        if planned is None:
            if is_known:  # a pickle has outgrown its slot, or something else is new
                captured, reserve = self._captured(self._state.completed(tree, look), look)
            planned = self._planner.plan(captured.tree)
        captured, planned = capture_hidden(captured, planned, reserve)
        save.mark("planned")
        return captured, planned, reserve

    def _captured(self, tree: StateTree, look: Look) -> tuple[Captured, Reserve]:
        reserve = Reserve(self._stager.reserve_nbytes, [other.report for other in self._in_flight()])
        return capture(tree, self._state.buffers(look), reserve), reserve

    def _order_after_steps(self) -> None:
        try:
            self._fence.order_after_steps()
        except RuntimeError as error:
            raise DeviceError(f"ordering the save after optimizers' streams: {error}") from error

    def _check_step(self, step: int) -> None:
        for save in self._in_flight():
            if save.error is None and save.refused is None and step <= save.step:
                kind = "is" if step == save.step else f"comes after step {save.step}, which is"
                raise StepExistsError(f"step {step} {kind} in flight already")
        self._root.check_step(step)

    def _make_room(self, save: Save) -> bool:
        """Whether this save may go ahead, after waiting where that is the policy."""
        while len(self._in_flight()) >= self._max_in_flight:
            if self._when_busy == "skip":
                _log.warning(
                    "step %d is not saved: %d saves are in flight", save.step, len(self._in_flight())
                )
                save.report.skipped = True
                save.finish()
                return False
            self.fence()  # an unfenced save can never commit
            for oldest in self._in_flight()[:1]:
                self._await_room(oldest)
        return True

    def _await_calls(self, last_call: int | None) -> None:
        for save in self._in_flight():
            if last_call is not None and save.call <= last_call:
                self.fence()
                self._await_room(save)

    def _await_room(self, oldest: Save) -> None:
        if not oldest.done.wait(self._fence_timeout_s):
            raise SaveTimeoutError(
                f"step {oldest.step} is still not durable after {self._fence_timeout_s:g} s, and "
                f"{self._max_in_flight} saves in flight are the limit: does the disk hang?"
            )

    # -- fencing

    def fence(self, *, on_host: bool = True) -> None:
        """Wait until everything that save() spoke of may be changed.

        Called by itself, with on_host=False, before the step of any torch optimizer that shares a
        parameter with this state. Call it before you change, free, offload or resize the state in any
        other way. A failure found here is the save's; it surfaces where `on_error` says, not here.

        Args:
            on_host: return once every byte was copied. False: of what is on CUDA devices, return once
                the copies are enqueued (which `host_memory` as large as the state makes a matter of
                microseconds), and let this thread's current streams wait for them. Work that is
                enqueued there afterwards may change the state; nothing may free it yet.

        Raises:
            CaptureError: this thread's current stream is being captured.
        """
        if os.getpid() != self._pid or self._committer is None:
            return
        capturing = self._fence.is_capturing()
        if not on_host and not capturing:
            self._fence.note_streams()  # what comes now may change the state
        if not self._in_flight():
            return
        if capturing:
            raise CaptureError("fence() inside a CUDA graph's capture: call it before")
        deadline = Deadline(self._fence_timeout_s)
        with self._lock:
            for save in self._in_flight():
                save.fence(deadline, on_host)
            if not on_host:
                self._state.hold_back_arrays()  # behind the streams that wait for the copies now
            self._fence.passed()

    def fenced(self, replay: Callable[..., _Result]) -> Callable[..., _Result]:
        """`replay` with a fence before it; for what changes the state behind torch's hooks.

        A CUDA graph that holds an optimizer's step is such a thing: `replay = ckpt.fenced(graph.replay)`,
        and call that. It must be outermost: whatever calls `graph.replay` itself goes unfenced.
        """

        @functools.wraps(replay)
        def fenced(*args: Any, **kwargs: Any) -> _Result:
            self.fence(on_host=False)
            return replay(*args, **kwargs)

        self._fences_replays = True
        return fenced

    def _fence_before_change(self) -> None:
        if not self._fences_by_hand:
            self.fence(on_host=False)

    def _fence_capture(self) -> None:
        if self._fences_by_hand:
            return
        deadline = Deadline(min(self._fence_timeout_s, ABORT_S))
        with self._lock:
            for save in self._in_flight():
                save.fence(deadline, captured=True)

    def _check_capture(self) -> None:
        if self._committer is None:
            return
        if self._fence.is_capturing():
            raise CaptureError("save() inside a CUDA graph's capture: call it between replays")
        if self._fence.step_was_captured and not self._fences_replays:
            raise CaptureError(
                "an optimizer's step was captured into a CUDA graph, and replays run no hooks: replay it "
                'through ckpt.fenced(graph.replay), or pass fencing="manual" and call fence() yourself'
            )

    def _decide_released(self) -> None:
        """Check saves that were copied without a fence: this is the first time we can."""
        for save in self._in_flight():
            if not save.checked.is_set() and save.snapshot is not None and save.snapshot.released:
                save.fence(Deadline(self._fence_timeout_s))

    # -- waiting

    def wait(self, progress: Callable[[int], None] | None = None) -> None:
        """Wait until every save is durable. Fences, if this thread saved.

        Args:
            progress: called now and then with the number of saves still in flight.

        Raises:
            SaveError: one failed, and nobody was told yet.
        """
        self._check_usable()
        if all(save.thread == threading.get_ident() for save in self._in_flight()):
            self.fence()
        self._drain(progress)
        self._failures.raise_due()

    def _drain(self, progress: Callable[[int], None] | None = None) -> None:
        for save in self._in_flight():
            while not save.done.wait(_PROGRESS_INTERVAL_S):
                if progress is not None:
                    progress(len(self._in_flight()))

    def _settle(self, save: Save, timeout_s: float | None) -> None:
        if os.getpid() != self._pid:
            raise ForkedError("this save belongs to the parent process")
        timeout_s = None if timeout_s is None else min(timeout_s, options.FOREVER_S)
        mine = save.thread == threading.get_ident()
        snapshot = save.snapshot
        copied = snapshot is None or snapshot.released  # else devices are at it, which may hang
        if mine and not save.done.is_set() and not (save.checked.is_set() and copied):
            if timeout_s is not None and snapshot is not None and not snapshot.wait_released(timeout_s):
                raise TimeoutError(f"step {save.step} is not even copied after {timeout_s:g} s")
            self.fence()
        self._wait_done(save, timeout_s)

    @staticmethod
    def _wait_done(save: Save, timeout_s: float | None) -> None:
        if not save.done.wait(timeout_s):
            raise TimeoutError(f"step {save.step} is not durable after {timeout_s:g} s")

    def _at_risk(self) -> list[Callable[[], frozenset[int]]]:
        begun = [(save, save.snapshot) for save in self._in_flight()]
        return [
            s.storages for save, s in begun if s is not None and not (save.checked.is_set() and s.released)
        ]

    def _in_flight(self) -> list[Save]:
        return self._committer.in_flight if self._committer is not None else []

    # -- loading

    def steps(self) -> list[int]:
        """Visible steps, ascending, that look whole; load() still verifies every byte."""
        self._check_usable()
        return [entry.step for entry in self._root.entries() if entry.committed and entry.problem is None]

    def load_latest(self, *, strict: bool = True, trusted: bool = False) -> Resume | None:
        """Load the newest step that is whole and verified; None if nothing was ever committed here.

        A step that is damaged is passed over (logged, and listed in the result). If none is good, the
        live state may be half overwritten, and save() refuses until a load succeeds.

        Args:
            strict: missing and unexpected leaves are errors (whole sections only in steps that we wrote).
            trusted: let files import classes; only for files whose writers you trust.

        Raises:
            NoIntactStepError: steps exist, none is good.
            MismatchError: the step does not fit the live objects; lists every difference.
            UntrustedError: a leaf needs a class that is not imported unless trusted.
        """
        self._check_usable()
        self.fence()
        self._drain()
        return self._loader.latest(strict, trusted)

    def load(
        self,
        step: int,
        *,
        strict: bool = True,
        trusted: bool = False,
        verify: Literal["during", "before"] = "during",
    ) -> Resume:
        """Load one step; later saves continue from it.

        Args:
            verify: "before" reads the step twice, so that a damaged one leaves the live state untouched.

        Raises:
            StepNotFoundError, CorruptStepError; MismatchError and UntrustedError as in load_latest().
        """
        options.check_choice("verify", verify, ("during", "before"))
        self._check_usable()
        self.fence()
        self._drain()
        return self._loader.step(step, strict, trusted, verify_first=verify == "before")

    # -- the end

    def close(self) -> None:
        """Finish every save and give the root up. Closing again does nothing.

        If a device hangs, so that the copies of a save do not end, that save is given up after
        `fence_timeout_s`, and the memory that the device may still touch is left to it.

        Raises:
            SaveError: a save failed, and nobody was told yet. All is closed nevertheless.
        """
        if self._closed or os.getpid() != self._pid:
            return
        with self._lock:  # a save() under way on another thread comes first
            if self._closed:
                return
            self._closed = True
            if self._committer is not None:
                self._close(self._committer)
            else:
                self._ranks.close()
        self._failures.raise_due()

    def _close(self, committer: Committer) -> None:
        try:
            self.fence()
            self._drain()
        finally:
            for save in self._in_flight():
                if not save.checked.is_set():  # after an interruption: it must not hold up the end
                    save.fail(SaveError(f"step {save.step} was not saved: the checkpointer was closed"))
                    save.checked.set()
            committer.stop()
            self._fence.remove()
            self._stager.close(min(self._fence_timeout_s, ABORT_S))
            if self._lease is not None:
                self._lease.release()
            self._ranks.close()
            atexit.unregister(self._at_exit)

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _log.error("besides: %s", failure)  # what ended the block comes first

    def _at_exit(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self.close()
        except Exception as error:  # noqa: BLE001 -- whatever it is, it must not look like success
            # Python turns whatever atexit raises, sys.exit included, into exit code 0.
            _log.critical("a save failed and nobody was told: %s", error)
            sys.stderr.write(f"asyncckpt: a save failed and nobody was told: {error}\n")
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_EXIT_UNREPORTED)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this checkpointer belongs to process {self._pid}; make a new one in this child"
            )
        if self._closed:
            raise ClosedError("this checkpointer was closed")

    @property
    def plans_made(self) -> int:
        """How often the layout of the files had to be made: once per structure of the state."""
        return self._planner.plans_made if self._committer is not None else 0
