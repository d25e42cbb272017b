"""Tiny tensors packed on their device: where they go, when it is done, and that nothing else differs.

Saves run over the driver double; the kernel is the product's own text, compiled for the CPU.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from asyncckpt import AsyncCheckpointer, devices, kernels, packing
from asyncckpt.devices import HOST
from asyncckpt.errors import DeviceError, TornStateError
from asyncckpt.formats.image import ImageBuilder
from asyncckpt.packing import Packer, lay_out
from asyncckpt.plan import NO_SLAB, Planned, WritePlan
from asyncckpt.trial import Trial
from tests.cuda_double import ILLEGAL_ADDRESS, Double
from tests.fake_cuda import FakeCuda
from tests.gather_on_cpu import DoubleGatherer
from tests.real_cuda import Rehearsal, World, entered
from tests.test_torn import copying_held, stored

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # dcp.load's

LAYOUTS = ["dcp", "megatron"]
PLENTY = 1 << 22  # of host memory

# ---------------------------------------------------------------------------- layout


Piece = tuple[int, int]  # gap before it, bytes


def plan_of(*files: list[Piece]) -> tuple[WritePlan, Any]:
    """Sources in file order, each whole."""
    images, sizes = [], []
    for number, pieces in enumerate(files):
        builder = ImageBuilder(f"file-{number}")
        for gap, nbytes in pieces:
            builder.literal(bytes(gap))
            builder.record(len(sizes), nbytes)
            sizes.append(nbytes)
        builder.literal(b"end")
        images.append(builder.build())
    return WritePlan(tuple(images), (), tuple(map(str, sizes)), (), None), np.array(sizes, dtype=np.uint64)


def laid_out(plan: WritePlan, sizes: Any, on: Any) -> dict[int, list[tuple[int, int]]]:
    """(source, place) of each device."""
    return {
        slab.device: list(zip(slab.sources.tolist(), slab.places.tolist(), strict=True))
        for slab in lay_out(plan, sizes, np.array(on, dtype=np.int32))
    }


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors are enough."""
    monkeypatch.setattr(packing, "TENSORS_MIN", 2)


@pytest.mark.usefixtures("few")
def test_places_are_those_of_the_file_within_a_run() -> None:
    """The example at `_places`: a gap in the file that is too wide ends the run."""
    plan, sizes = plan_of([(100, 50), (10, 140), (700, 30), (0, 20)])
    assert laid_out(plan, sizes, [0, 0, 0, 0]) == {0: [(0, 36), (1, 96), (2, 936), (3, 966)]}
    plan, sizes = plan_of([(100, 50), (10, 140), (8700, 30), (0, 20)])
    assert laid_out(plan, sizes, [0, 0, 0, 0]) == {0: [(0, 36), (1, 96), (2, 296), (3, 326)]}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("pieces", "on", "packed"),
    [
        ([(9, 8)] * 4, [0, 0, 0, 0], {0: [0, 1, 2, 3]}),
        ([(9, 8)] * 4, [HOST] * 4, {}),
        ([(9, 8)] * 5, [0, 0, HOST, 0, 0], {0: [0, 1, 3, 4]}),
        ([(9, 8)] * 5, [0, HOST, 0, HOST, 0], {}),  # alone, each is a copy as it was
        ([(9, 8)] * 5, [0, 0, 1, 1, 0], {0: [0, 1], 1: [2, 3]}),
        ([(9, 8), (9, 32768), (9, 8), (9, 8)], [0] * 4, {0: [0, 1, 2, 3]}),
        ([(9, 8), (9, 32769), (9, 8), (9, 8)], [0] * 4, {0: [2, 3]}),
        ([(9, 8), (8192, 8), (8193, 8)], [0] * 3, {0: [0, 1]}),
        ([(9, 8), (9, 0), (9, 8)], [0] * 3, {0: [0, 2]}),  # of no bytes: nowhere in the file
        ([], [], {}),
        ([(9, 0)], [0], {}),
    ],
)
def test_what_is_packed(pieces: list[Piece], on: list[int], packed: dict[int, list[int]]) -> None:
    found = laid_out(*plan_of(pieces), on)
    assert {device: [source for source, _ in rows] for device, rows in found.items()} == packed


@pytest.mark.usefixtures("few")
def test_runs_end_with_the_file() -> None:
    plan, sizes = plan_of([(9, 8), (9, 8)], [(9, 8)], [(9, 8), (9, 8)])
    assert [source for source, _ in laid_out(plan, sizes, [0] * 5)[0]] == [0, 1, 3, 4]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("how", ["twice", "in part", "from its middle"])
def test_what_is_not_whole_in_one_place_stays_where_it_is(how: str) -> None:
    plan, sizes = plan_of([(9, 8), (9, 8), (9, 8), (9, 8), (9, 8)])
    extents = plan.images[0].extents
    if how == "twice":  # as two files of one step would share a storage
        extents[extents[:, 2] == 4, 2] = 2
    elif how == "in part":
        sizes[2] = 9
    else:
        sizes[2] = 16
        extents[extents[:, 2] == 2, 3] = 8
    expected = [0, 1] if how == "twice" else [0, 1, 3, 4]
    assert [source for source, _ in laid_out(plan, sizes, [0] * 5)[0]] == expected


def test_a_device_needs_enough_of_them() -> None:
    plan, sizes = plan_of([(9, 8)] * 600)
    assert laid_out(plan, sizes, [0] * 255 + [1] * 345).keys() == {1}
    assert laid_out(plan, sizes, [0] * 256 + [1] * 344).keys() == {0, 1}


@pytest.mark.usefixtures("few")
def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BUFFER_NBYTES_MAX", 1000)
    plan, sizes = plan_of([(64, 64)] * 20)
    for slab in lay_out(plan, sizes, np.zeros(20, dtype=np.int32)):
        assert slab.sources.tolist() == list(range(8))
        assert slab.nbytes == 64 * 15 <= 1000


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("seed", range(20))
def test_layouts_keep_their_promises(seed: int) -> None:
    rng = random.Random(seed)
    files = [
        [(rng.choice([1, 60, 1500, 9000]), rng.choice([0, 4, 100, 5000, 40000])) for _ in range(80)]
        for _ in range(2)
    ]
    plan, sizes = plan_of(*files)
    on = np.array([rng.choice([HOST, 0, 0, 0, 1]) for _ in sizes], dtype=np.int32)
    offsets = {s: o for image in plan.images for o, _, s, _, _ in image.extents.tolist() if s >= 0}
    for slab in lay_out(plan, sizes, on):
        assert (on[slab.sources] == slab.device).all()
        assert (slab.sizes == sizes[slab.sources]).all()
        ends = slab.places + slab.sizes
        assert (slab.places[1:] >= ends[:-1]).all()
        assert ends[-1] == slab.nbytes
        for source, place in zip(slab.sources.tolist(), slab.places.tolist(), strict=True):
            assert (place - offsets[source]) % 64 == 0
        distance = {
            s: p - offsets[s] for s, p in zip(slab.sources.tolist(), slab.places.tolist(), strict=True)
        }
        for one, other in zip(slab.sources.tolist(), slab.sources.tolist()[1:], strict=False):
            between = [s for s in range(one + 1, other) if sizes[s]]
            near = offsets[other] - offsets[one] - int(sizes[one]) <= 8192
            if not between and near and (one < 80) == (other < 80):
                assert distance[one] == distance[other]


# ---------------------------------------------------------------------------- policy


class Memory:
    """Stands in for a gatherer: remembers what it was asked, answers with host memory or an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[int] = []

    def gather(self, device: int, table: kernels.Table, nbytes: int) -> torch.Tensor:
        self.asked.append(device)
        if self.error is not None:
            raise self.error
        return torch.zeros(nbytes, dtype=torch.uint8)


def use(monkeypatch: pytest.MonkeyPatch, gatherer: kernels.Gatherer | None) -> None:
    monkeypatch.setattr(kernels, "gatherer", lambda: gatherer)


def planned(plan: WritePlan, sizes: Any, on: Any = 0) -> Planned:
    addresses = np.arange(len(sizes), dtype=np.uint64) * np.uint64(1 << 20)
    where = np.full(len(sizes), on, dtype=np.int32) if isinstance(on, int) else np.array(on, dtype=np.int32)
    return Planned(plan, addresses, sizes, where, (), (), ("held",), replanned=False)


MANY = [(9, 8)] * 300


def test_sources_move_to_the_buffer_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    use(monkeypatch, memory)
    plan, sizes = plan_of([*MANY, (9, 1 << 20), *MANY])
    before = planned(plan, sizes, [0] * 300 + [0] + [1] * 299 + [HOST])
    done = Packer("always").pack(before)
    assert memory.asked == [0, 1]
    assert done.tensors == 599
    assert done.sample is not None
    after = done.planned
    assert after.slabs is not None
    assert after.slabs.tolist() == [0] * 300 + [NO_SLAB] + [1] * 299 + [NO_SLAB]
    moved = after.slabs != NO_SLAB
    assert (after.addresses[~moved] == before.addresses[~moved]).all()
    *held, buffers = after.held
    assert held == ["held"]
    for number, buffer in enumerate(buffers):
        mine = after.addresses[after.slabs == number]
        assert mine.min() >= buffer.data_ptr()
        assert mine.max() + 8 == buffer.data_ptr() + buffer.nbytes


@pytest.mark.parametrize("choice", ["never", "auto", "always"])
@pytest.mark.parametrize("state", ["host", "few"])
def test_where_there_is_nothing_to_pack_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch, choice: str, state: str
) -> None:
    monkeypatch.setattr(kernels, "gatherer", lambda: pytest.fail("CuPy was looked for"))
    plan, sizes = plan_of(MANY if state == "host" else MANY[:100])
    save = planned(plan, sizes, HOST if state == "host" else 0)
    assert Packer(choice).pack(save).planned is save


def test_never_is_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gatherer", lambda: pytest.fail("CuPy was looked for"))
    save = planned(*plan_of(MANY))
    assert Packer("never").pack(save) == packing.Packing(save)


@pytest.mark.parametrize("choice", ["auto", "always"])
def test_without_cupy_saves_go_unpacked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    use(monkeypatch, None)
    packer, save = Packer(choice), planned(*plan_of(MANY))
    assert [packer.pack(save).tensors for _ in range(4)] == [0] * 4
    assert caplog.text.count("CuPy is not installed") == (choice == "always")


def costs(packer: Packer, save: Planned, packed_s: float, plain_s: float, saves: int) -> list[bool]:
    """Saves that cost so much; which were packed."""
    ways = []
    for _ in range(saves):
        done = packer.pack(save)
        ways.append(done.tensors > 0)
        if done.sample is not None:
            done.sample.note(packed_s if done.tensors else plain_s)
    return ways


@pytest.mark.parametrize("is_faster", [True, False])
def test_auto_tries_both_and_keeps_the_faster(monkeypatch: pytest.MonkeyPatch, is_faster: bool) -> None:
    use(monkeypatch, Memory())
    packer = Packer("auto")
    save = planned(*plan_of(MANY))
    ways = costs(packer, save, 1.0, 2.0 if is_faster else 0.5, 12)
    assert ways[:7] == [True, False] * 3 + [True]
    assert ways[7:] == [is_faster] * 5
    other = planned(*plan_of(MANY))  # another plan: it starts over
    assert costs(packer, other, 1.0, 0.5 if is_faster else 2.0, 9)[7:] == [not is_faster] * 2
    moved = planned(other.plan, other.sizes, 1)  # the same on another device
    assert costs(packer, moved, 1.0, 2.0 if is_faster else 0.5, 9)[7:] == [is_faster] * 2


def test_always_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Memory())
    assert costs(Packer("always"), planned(*plan_of(MANY)), 9.0, 1.0, 9) == [True] * 9


@pytest.mark.parametrize("choice", ["auto", "always"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("Out of memory allocating 9 bytes")]
)
def test_a_full_device_packs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: str, error: Exception
) -> None:
    memory = Memory(error)
    use(monkeypatch, memory)
    packer, save = Packer(choice), planned(*plan_of(MANY))
    assert packer.pack(save).planned is save
    assert costs(packer, save, 1.0, 1.0, 5) == [False] * 5
    # To look again makes torch give its cache back: not for the sake of a trial.
    assert len(memory.asked) == (1 if choice == "auto" else 6)
    assert caplog.text.count("there is no memory") == 1
    memory.error = None
    assert packer.pack(save).tensors == (0 if choice == "auto" else 300)
    assert packer.pack(planned(*plan_of(MANY))).tensors == 300  # of another plan


@pytest.mark.parametrize("choice", ["auto", "always"])
@pytest.mark.parametrize("where", ["import", "launch"])
def test_a_kernel_that_is_refused_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: str, where: str
) -> None:
    memory = Memory(RuntimeError("nvrtc: error: invalid value for --gpu-architecture"))

    def find() -> kernels.Gatherer:
        if where == "import":
            memory.asked.append(0)
            raise RuntimeError("invalid value for --gpu-architecture")
        return memory

    monkeypatch.setattr(kernels, "gatherer", find)
    packer, save = Packer(choice), planned(*plan_of(MANY))
    assert costs(packer, save, 1.0, 1.0, 5) == [False] * 5
    assert packer.pack(planned(*plan_of(MANY))).tensors == 0
    assert len(memory.asked) == 1
    assert caplog.text.count("invalid value for --gpu-architecture") == 1


def test_an_interrupt_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr(memory, "gather", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    use(monkeypatch, memory)
    with pytest.raises(KeyboardInterrupt):
        Packer("always").pack(planned(*plan_of(MANY)))


# ---------------------------------------------------------------------------- saves


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    double = Double()
    double.reset(seed=len(request.node.name), delay_us_max=50)
    with FakeCuda(double) as world:
        monkeypatch.setattr(devices, "seam", world)
        yield world
    double.reset()


@pytest.fixture
def gatherer(monkeypatch: pytest.MonkeyPatch, world: FakeCuda) -> DoubleGatherer:
    found = DoubleGatherer(world)
    use(monkeypatch, found)
    return found


class Tiny(nn.Module):
    """Hundreds of tiny parameters of odd sizes on each device, some tied, one large between; some host's."""

    def __init__(self, world: World | FakeCuda, on: tuple[int, ...] = (0,), count: int = 300) -> None:
        super().__init__()
        rng = random.Random(7)
        self.many = nn.ParameterList()
        for device in on:
            whole = world.to_device(torch.rand(1 << 16), device)
            for index in range(count):
                begin, length = rng.randrange(1 << 14), rng.choice([1, 3, 8, 16, 250, 4000])
                value = whole[begin : begin + length].clone()
                self.many.append(nn.Parameter(value.to(torch.bfloat16) if index % 3 == 0 else value))
            self.many.append(nn.Parameter(whole))
            self.many.append(nn.Parameter(torch.rand(9)))
        self.many.append(self.many[5])
        self.world = world

    def on_device(self, device: int = 0) -> list[torch.Tensor]:
        return [p.detach() for p in self.parameters() if self.world.device_of(p) == device]

    def values(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": self.world.to_host(p) for name, p in self.state_dict().items()}

    def overwrite(self) -> None:
        """By a kernel on the current stream; no version counts it."""
        for device in (0, 1):
            if tensors := self.on_device(device):
                self.world.kernel(lambda *aliases: [alias.fill_(-1) for alias in aliases], *tensors)


def same(root: Path, layout: str, step: int, expected: dict[str, torch.Tensor]) -> bool:
    found = stored(root, layout, step)
    return all(torch.equal(found[name].cpu(), value) for name, value in expected.items())


def checkpointer(root: Path, model: nn.Module, **options: Any) -> AsyncCheckpointer:
    options = {"pack": "always", "host_memory": PLENTY, "save_rng": False, **options}
    return AsyncCheckpointer(root, model=model, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("host_memory", [1 << 17, PLENTY])
def test_what_the_next_kernels_change_is_not_in_the_files(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, layout: str, host_memory: int
) -> None:
    model = Tiny(world, (0, 1))
    with checkpointer(tmp_path, model, layout=layout, host_memory=host_memory) as ckpt:
        for step in range(1, 5):
            for tensor in [*model.on_device(0), *model.on_device(1)]:
                tensor.add_(step)
            expected = model.values()
            handle = ckpt.save(step)
            ckpt.fence(on_host=False)
            model.overwrite()
            report = handle.wait()
            assert report.packed == sum(rows for _, rows in gatherer.launches[-2:]) >= 580
            assert report.pack_s > 0
            assert same(tmp_path, layout, step, expected)
            assert not torch.equal(model.values()["model.many.4"], expected["model.many.4"])
    assert [device for device, _ in gatherer.launches] == [0, 1] * 4
    assert world.double.counter("pageable") == 0


def test_stock_dcp_reads_what_was_packed(world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path) -> None:
    model = Tiny(world)
    expected = model.values()
    with checkpointer(tmp_path, model) as ckpt:
        assert ckpt.save(1).wait().packed
    names = [name.removeprefix("model.") for name in expected]
    into = {name: torch.zeros_like(expected[f"model.{name}"]) for name in names}
    dcp.load({"model": into}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert all(torch.equal(into[name], expected[f"model.{name}"]) for name in names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_the_same_bytes_packed_or_not(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, layout: str
) -> None:
    model = Tiny(world)
    copies, files = [], []
    for pack in ("never", "always"):
        with checkpointer(tmp_path / pack, model, layout=layout, pack=pack) as ckpt:
            before = world.double.counter("copies_to_host")
            ckpt.save(1).wait()
            copies.append(world.double.counter("copies_to_host") - before)
        directory = next(path for path in (tmp_path / pack).iterdir() if path.name[:4] in ("step", "iter"))
        data = [p for p in directory.rglob("*") if p.is_file() and p.suffix in (".distcp", ".pt")]
        files.append([path.read_bytes() for path in data])
    assert files[0] == files[1] != []
    assert copies[0] >= 300
    assert copies[1] <= 20


def test_a_resumed_run_reads_them_back(world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path) -> None:
    model = Tiny(world)
    expected = model.values()
    with checkpointer(tmp_path, model) as ckpt:
        assert ckpt.save(1).wait().packed
        model.overwrite()
        resume = ckpt.load_latest()
        assert resume is not None
        assert resume.verified
    assert all(torch.equal(value, expected[name]) for name, value in model.values().items())


class OnAnotherStream(DoubleGatherer):
    """A planted misuse: the kernel runs, unordered, on a stream that nobody waits for."""

    def enqueue(self, device: int, kernel: Any) -> None:
        stream = self.world.new_stream(device)
        gate = self.gate
        with self.world.stream(stream):
            self.world.launch(device, lambda: gate.wait(60))
            super().enqueue(device, kernel)

    def __init__(self, world: FakeCuda) -> None:
        super().__init__(world)
        self.gate = threading.Event()


class BeforeItsTurn(DoubleGatherer):
    """A planted misuse: the kernel runs at once."""

    def enqueue(self, device: int, kernel: Any) -> None:
        kernel()


@pytest.mark.parametrize("misuse", [OnAnotherStream, BeforeItsTurn])
def test_a_kernel_out_of_order_is_seen(
    monkeypatch: pytest.MonkeyPatch, world: FakeCuda, tmp_path: Path, misuse: type[DoubleGatherer]
) -> None:
    planted = misuse(world)
    use(monkeypatch, planted)
    model = Tiny(world)
    with checkpointer(tmp_path, model) as ckpt:
        world.synchronize()
        busy = _Busy(world)
        model.overwrite()  # the stream has this to do still
        handle = ckpt.save(1)
        busy.end()
        ckpt.fence()
        if isinstance(planted, OnAnotherStream):
            planted.gate.set()
        assert handle.wait().packed
        assert not same(tmp_path, "dcp", 1, model.values())


class _Busy:
    """The current stream stands still until told."""

    def __init__(self, world: FakeCuda) -> None:
        gate = threading.Event()
        self.end = gate.set
        world.launch(0, lambda: gate.wait(60))


def test_the_same_in_order_is_right(world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path) -> None:
    model = Tiny(world)
    with checkpointer(tmp_path, model) as ckpt:
        busy = _Busy(world)
        model.overwrite()
        handle = ckpt.save(1)  # waits for nothing: the stream stands still
        assert gatherer.launches
        busy.end()
        assert handle.wait().packed
        assert same(tmp_path, "dcp", 1, model.values())


@pytest.mark.parametrize("held", [True, False], ids=["held", "planted misuse"])
def test_the_buffer_is_held_until_its_bytes_are_copied(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, held: bool
) -> None:
    """Whoever allocates as much right after save() must not get it."""
    model = Tiny(world)
    expected = model.values()
    with checkpointer(tmp_path, model) as ckpt:
        ckpt.save(1).wait()
        with world.double.holding_copies():
            handle = ckpt.save(2)
            snapshot = handle._save.snapshot
            assert snapshot is not None
            nbytes = snapshot._held.held[-1][0].nbytes
            if not held:
                snapshot.let_go()
            del snapshot
            thief = world.to_device(torch.full((nbytes,), 7, dtype=torch.uint8))
            world.synchronize()
        handle.wait()
        del thief
    assert same(tmp_path, "dcp", 2, expected) is held


@pytest.mark.parametrize("pack", ["always", "never"])
@pytest.mark.parametrize("fenced", [True, False])
def test_storage_that_goes_away(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, pack: str, fenced: bool
) -> None:
    """Without a fence that is a tear, whether or not the bytes were safe in a buffer."""
    model = Tiny(world)
    expected = model.values()
    with checkpointer(tmp_path, model, pack=pack, on_error="warn") as ckpt:
        handle = ckpt.save(1)
        if fenced:
            ckpt.fence()
        model.many[4].untyped_storage().resize_(0)
        if fenced:
            assert bool(handle.wait().packed) is (pack == "always")
            assert same(tmp_path, "dcp", 1, expected)
        else:
            with pytest.raises(TornStateError, match=r"model\.many\.4"):
                handle.wait()


@pytest.mark.parametrize("pack", ["always", "never"])
def test_a_write_between_save_and_fence_is_named(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, pack: str
) -> None:
    model = Tiny(world)
    with checkpointer(tmp_path, model, pack=pack) as ckpt:
        handle = ckpt.save(1)
        model.many[4].detach().add_(1)
        with pytest.raises(TornStateError, match=r"model\.many\.4"):
            handle.wait()


def test_the_full_guard_sees_what_it_saw(world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path) -> None:
    """A write that no version counts and no fence comes before: packed, it would do no harm and go unseen."""
    model = Tiny(world)
    with checkpointer(tmp_path, model, guard="full") as ckpt:
        with copying_held() as reached:
            handle = ckpt.save(1)
            reached()
            model.overwrite()
            world.synchronize()
        with pytest.raises(TornStateError, match="checksum"):
            handle.wait()
    assert not gatherer.launches


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("no kernel")])
def test_a_refusal_costs_nothing_but_the_packing(
    monkeypatch: pytest.MonkeyPatch,
    world: FakeCuda,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """Also where the first device was packed before the second refused."""

    class Refusing(DoubleGatherer):
        def gather(self, device: int, table: kernels.Table, nbytes: int) -> torch.Tensor:
            if device == 1:
                raise error
            return super().gather(device, table, nbytes)

    use(monkeypatch, Refusing(world))
    model = Tiny(world, (0, 1))
    with checkpointer(tmp_path, model) as ckpt, caplog.at_level(logging.WARNING):
        for step in (1, 2):
            expected = model.values()
            handle = ckpt.save(step)
            ckpt.fence(on_host=False)
            model.overwrite()
            assert handle.wait().packed == 0
            assert same(tmp_path, "dcp", step, expected)
    assert caplog.text.count("copied one by one") == 1


def test_a_device_that_is_lost_fails_the_save_by_name(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path
) -> None:
    model = Tiny(world)
    ckpt = checkpointer(tmp_path, model)
    ckpt.save(1).wait()
    for entry_point in ("cuMemcpyDtoHAsync_v2", "cuMemcpyBatchAsync_v2"):
        world.double.fail_async(entry_point, ILLEGAL_ADDRESS)
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        ckpt.save(2).wait()
    world.double.reset()
    ckpt.close()


def test_what_a_save_costs_reaches_the_trial(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing, and copying without the waits for the disk; of saves that succeed."""
    trials: list[Trial] = []

    def trial() -> Trial:
        trials.append(Trial())
        return trials[-1]

    monkeypatch.setattr(packing, "Trial", trial)
    model = Tiny(world)
    with checkpointer(tmp_path, model, pack="auto", on_error="warn") as ckpt:
        reports = [ckpt.save(step).wait() for step in range(1, 4)]
        handle = ckpt.save(4)
        model.many[4].detach().add_(1)
        with pytest.raises(TornStateError):
            handle.wait()
        reports += [ckpt.save(step).wait() for step in range(5, 9)]
        assert trials[-1].verdict is None
        last = ckpt.save(9)
        assert trials[-1].verdict is not None
        assert bool(last.wait().packed) is trials[-1].verdict
    assert [bool(report.packed) for report in reports] == [True, False, True, True, False, True, False]
    for is_packed in (True, False):
        counted = [report for report in reports[1:] if bool(report.packed) is is_packed]
        expected = [
            report.pack_s + report.phases["released"] - report.phases["submitted"] - report.starved_s
            for report in counted
        ]
        found = trials[-1]._costs_s[is_packed]
        assert len(found) == 3
        assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_with_an_optimizer_goes_on_bit_for_bit(
    world: FakeCuda, gatherer: DoubleGatherer, tmp_path: Path, layout: str
) -> None:
    """Its moments are tiny too; the hook before its step is the fence."""
    model = nn.ParameterList([nn.Parameter(world.to_device(torch.rand(5 + i % 7))) for i in range(150)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        for index, parameter in enumerate(model):
            parameter.grad = torch.full_like(parameter, 0.1 * index)
        optimizer.step()

    step()
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, layout=layout, host_memory=PLENTY, pack="always"
    ) as ckpt:
        for number in range(1, 4):
            expected = {f"model.{name}": world.to_host(p) for name, p in model.state_dict().items()}
            with world.double.holding_copies():
                handle = ckpt.save(number)
                step()
            assert handle.wait().packed >= 256
            assert same(tmp_path, layout, number, expected)
            assert not torch.equal(world.to_host(model[0]), expected["model.0"])


# ---------------------------------------------------------------------------- CuPy itself


ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)


@pytest.fixture(params=[ON_CUDA, "double"])
def either_world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A real device with CuPy's kernel; or the double, where this test shows its own mistakes."""
    if request.param == "cuda":
        pytest.importorskip("cupy", reason="CuPy is not installed")
    for found in entered(request.param, 1, monkeypatch):
        if isinstance(found, Rehearsal):
            use(monkeypatch, DoubleGatherer(found))
        yield found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_over_a_busy_stream(either_world: World, tmp_path: Path, layout: str) -> None:
    """save() waits for nothing that the device has to do, and the files have what was there in its turn."""
    world = either_world
    model = Tiny(world, count=300 if world.name == "double" else 3000)
    with checkpointer(tmp_path, model, layout=layout, host_memory=32 << 20) as ckpt:
        assert ckpt.save(1).wait().packed  # imported and compiled
        for step in range(2, 5):
            is_busy = world.occupy(0.2 if world.name == "cuda" else 20.0)
            for tensor in model.on_device():
                tensor.add_(step)
            clones = {f"model.{name}": p.detach().clone() for name, p in model.state_dict().items()}
            handle = ckpt.save(step)
            assert is_busy()
            ckpt.fence(on_host=False)
            model.overwrite()
            assert handle.wait().packed
            expected = {name: world.to_host(clone) for name, clone in clones.items()}
            assert same(tmp_path, layout, step, expected)
