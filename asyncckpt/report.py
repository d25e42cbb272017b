"""What a save cost, and what it achieved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SaveReport:
    """The account of one save. Complete once its handle is done.

    Attributes:
        step: the step number.
        nbytes: bytes of all files.
        blocked_s: what the host lost of training: inside save(), in the fences that waited for this save,
            and in waits for an earlier save to make room. A stream that the step's fence lets wait for
            copies is not in it: the host goes on, and what the device loses only the device knows.
        durable_s: from the call of save() until a power cut could not undo it; None until then.
        phases: seconds from the call of save() until each phase was reached: planned, captured,
            submitted, enqueued, released, written, checked, manifest, renamed, durable, ...
        state_dict_s: seconds that the state_dict() of each section (model, optimizer, extra, ...) took. One
            that waits for a device, as GradScaler's does, shows here; we wait for none.
        captured_nbytes: copied inside save(), because training may change it before the next fence.
        captured_on_devices_nbytes: of these, what was copied on a CUDA device; that is not `host_memory`.
        pickled_nbytes: of python leaves, which are copied too; they come on top of `host_memory`.
        starved_s: how long a copying thread waited for free chunks, on average: the disk's backpressure. Not
            in it is what the first save waits for memory to be pinned.
        prefault_s: how long it took to make the memory for staging present, in the background from the
            checkpointer's construction on; None if that still went on when this save was written.
        packed: tiny tensors that a kernel gathered on their device before they were copied; see `pack`.
        pack_s: how long save() took over that; the first time, CuPy is imported and the kernel compiled.
        replanned: whether the layout of the files had to be made for this save.
        direct: whether all of it was written with O_DIRECT.
        skipped: nothing was saved, because earlier saves were still in flight.
    """

    step: int
    nbytes: int = 0
    blocked_s: float = 0.0
    durable_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    state_dict_s: dict[str, float] = field(default_factory=dict)
    captured_nbytes: int = 0
    captured_on_devices_nbytes: int = 0
    pickled_nbytes: int = 0
    starved_s: float = 0.0
    prefault_s: float | None = None
    packed: int = 0
    pack_s: float = 0.0
    replanned: bool = False
    direct: bool = False
    skipped: bool = False

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes per second from the call to durable; None until then."""
        return self.nbytes / self.durable_s / 1e9 if self.durable_s else None
