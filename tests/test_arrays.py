"""CuPy and NumPy arrays in `extra`.

What has no GPU runs with a stand-in for CuPy: a module of that name whose arrays speak DLPack over host
memory, or over memory of the driver double. With `-m gpu` the same is asked of CuPy itself.
"""

from __future__ import annotations

import gc
import importlib.abc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from asyncckpt import AsyncCheckpointer, arrays, devices
from asyncckpt.errors import LeafError, MismatchError, TornStateError
from asyncckpt.state import TrainingState
from tests.cuda_double import Double
from tests.fake_cuda import FakeCuda

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # dcp.load's

LAYOUTS = ["dcp", "megatron"]
DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
HOST_MEMORY = 1 << 20
LARGE = 1 << 18  # float32 elements: more than save() copies of that much host memory


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class StandIn:
    """What `asyncckpt` asks of a `cupy.ndarray`.

    Attributes:
        host: a NumPy array whose memory it is, or a tensor.
        kind: of its device; 2 is CUDA.
        streams: what __dlpack__ was given, call by call.
    """

    def __init__(self, host: Any, kind: int = 1) -> None:
        self.host = host
        self.kind = kind
        self.streams: list[Any] = []

    @property
    def itemsize(self) -> int:
        return int(self.host.itemsize)

    @property
    def strides(self) -> tuple[int, ...]:
        if isinstance(self.host, torch.Tensor):
            return tuple(step * self.host.itemsize for step in self.host.stride())
        return tuple(self.host.strides)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 3 if self.kind == 2 else 0

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        self.streams.append(stream)
        return self.host.__dlpack__(**options)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The stand-in, imported by the user."""
    module = SimpleNamespace(ndarray=StandIn)
    monkeypatch.setitem(sys.modules, "cupy", module)  # type: ignore[arg-type]
    return module


def save(root: Path, layout: str, extra: dict[str, Any], step: int = 1, **options: Any) -> None:
    with AsyncCheckpointer(root, extra=extra, layout=layout, save_rng=False, **options) as checkpointer:
        checkpointer.save(step).wait()


def load(root: Path, layout: str, extra: dict[str, Any]) -> None:
    with AsyncCheckpointer(root, extra=extra, layout=layout, save_rng=False, read_only=True) as checkpointer:
        assert checkpointer.load_latest() is not None


def read_by_stock(root: Path, layout: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`extra` of step 1, read by nothing of ours."""
    if layout == "megatron":
        path = root / "iter_0000001/mp_rank_00/model_optim_rng.pt"
        tree = torch.load(path, map_location="cpu", weights_only=True)
        return dict(tree["extra"])
    state = {"extra": {key: torch.empty_like(value, device="cpu") for key, value in like.items()}}
    dcp.load(state, checkpoint_id=root / "step-1", no_dist=True)
    return state["extra"]


def counted(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)


# ---------------------------------------------------------------------------- CuPy: there and back


@pytest.mark.usefixtures("cupy")
def test_arrays_of_every_dtype_are_filled_in_place(tmp_path: Path, layout: str) -> None:
    values = {dtype: counted(dtype, 3, 5) for dtype in DTYPES}
    extra = {name: StandIn(value.copy()) for name, value in values.items()}
    live = dict(extra)
    save(tmp_path, layout, extra)
    assert all(extra[name] is array for name, array in live.items())  # what is the user's stays
    for array in live.values():
        array.host[...] = 0
    load(tmp_path, layout, extra)
    for name, value in values.items():
        assert extra[name] is live[name]
        np.testing.assert_array_equal(live[name].host, value)


def shapes() -> dict[str, np.ndarray[Any, Any]]:
    whole = counted("f4", 6, 8)
    return {
        "scalar": counted("f8"),
        "empty": counted("i4", 0, 3),
        "transposed": counted("f4", 3, 4).T,
        "strided": whole[1::2, ::3],
        "repeated": np.broadcast_to(np.float32(7), (3,)).copy(),
    }


@pytest.mark.usefixtures("cupy")
def test_arrays_of_every_shape_are_filled_in_place(tmp_path: Path, layout: str) -> None:
    values = {name: value.copy() for name, value in shapes().items()}
    extra = {name: StandIn(value) for name, value in shapes().items()}
    save(tmp_path, layout, extra)
    around = extra["strided"].host.base.copy()
    for array in extra.values():
        array.host[...] = 0
    load(tmp_path, layout, extra)
    for name, value in values.items():
        np.testing.assert_array_equal(extra[name].host, value)
    np.testing.assert_array_equal(extra["strided"].host.base, around)  # what lies between its elements too


@pytest.mark.usefixtures("cupy")
def test_nothing_is_copied_on_the_way_into_the_tree() -> None:
    array = StandIn(counted("f4", 5))
    tree = TrainingState(extra={"x": array, "deep": {"er": {"y": array}}}, rng=False).capture(1)
    for tensor in (tree["extra"]["x"], tree["extra"]["deep"]["er"]["y"]):
        assert type(tensor) is torch.Tensor
        assert tensor.data_ptr() == array.host.ctypes.data


@pytest.mark.usefixtures("cupy")
def test_a_tensor_keeps_its_array() -> None:
    host = counted("f4", 1000)
    tensor = arrays.as_tensor("x", StandIn(host))
    count = sys.getrefcount(host)
    del tensor
    assert sys.getrefcount(host) < count


@pytest.mark.usefixtures("cupy")
def test_stock_torch_reads_what_was_an_array(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"x": counted("f4", 3, 5), "y": counted("i8", 4)}
    save(tmp_path, layout, {name: StandIn(value) for name, value in values.items()})
    monkeypatch.delitem(sys.modules, "cupy")
    with imports_noted() as asked:
        like = {name: torch.from_numpy(value) for name, value in values.items()}
        found = read_by_stock(tmp_path, layout, like)
    assert "cupy" not in asked
    for name, value in values.items():
        assert type(found[name]) is torch.Tensor
        assert torch.equal(found[name], torch.from_numpy(value))


@pytest.mark.usefixtures("cupy")
def test_arrays_and_tensors_stand_for_each_other(tmp_path: Path, layout: str) -> None:
    save(tmp_path / "array", layout, {"x": StandIn(counted("f4", 5))})
    tensor = torch.zeros(5)
    extra: dict[str, Any] = {"x": tensor}
    load(tmp_path / "array", layout, extra)
    assert extra["x"] is tensor
    assert torch.equal(tensor, torch.arange(1.0, 6))
    extra = {"x": None}
    load(tmp_path / "array", layout, extra)
    assert torch.equal(extra["x"], torch.arange(1.0, 6))

    save(tmp_path / "tensor", layout, {"x": torch.arange(5.0)})
    array = StandIn(np.zeros(5, "f4"))
    load(tmp_path / "tensor", layout, {"x": array})
    np.testing.assert_array_equal(array.host, np.arange(5))


@pytest.mark.usefixtures("cupy")
def test_arrays_in_dicts_are_filled_and_what_is_beside_them_is_replaced(tmp_path: Path, layout: str) -> None:
    def make(value: int, note: str) -> dict[str, Any]:
        inner = {"array": StandIn(np.full(4, value, "i4")), "tensor": torch.full((3,), value), "note": note}
        return {"outer": {"inner": inner, "n": value, "none": {}}, "plain": value}

    save(tmp_path, layout, make(7, "then"))
    extra = make(0, "now")
    array = extra["outer"]["inner"]["array"]
    load(tmp_path, layout, extra)
    inner = extra["outer"]["inner"]
    assert inner["array"] is array
    np.testing.assert_array_equal(array.host, np.full(4, 7))
    assert inner["tensor"].tolist() == [7, 7, 7]
    assert (inner["note"], extra["outer"]["n"], extra["plain"]) == ("then", 7, 7)
    assert extra["outer"]["none"] == {}


@pytest.mark.usefixtures("cupy")
def test_two_views_of_one_array_and_the_array_twice(tmp_path: Path, layout: str) -> None:
    def make(host: np.ndarray[Any, Any]) -> dict[str, Any]:
        whole = StandIn(host)
        return {"whole": whole, "again": whole, "part": StandIn(host[: LARGE // 2])}

    host = counted("f4", LARGE)
    save(tmp_path, layout, make(host), host_memory=HOST_MEMORY)
    blank = np.zeros_like(host)
    load(tmp_path, layout, make(blank))
    np.testing.assert_array_equal(blank, host)


# ---------------------------------------------------------------------------- what does not fit


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(
    ("live", "said"),
    [
        (counted("f4", 4), r"extra\.x: float32\[4\] here, float32\[5\] in the checkpoint"),
        (counted("f8", 5), r"extra\.x: float64\[5\] here, float32\[5\] in the checkpoint"),
        (counted("f4", 5)[::-1], r"extra\.x: the array's strides are negative"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_an_array_of_another_form_is_a_mismatch(
    tmp_path: Path, layout: str, live: np.ndarray[Any, Any], said: str
) -> None:
    save(tmp_path, layout, {"x": StandIn(counted("f4", 5)), "deep": {"x": torch.ones(2)}})
    array, before = StandIn(live), live.copy()
    extra: dict[str, Any] = {"x": array, "deep": {"x": StandIn(np.ones(3, "f4"))}}
    with pytest.raises(MismatchError, match=said) as caught:
        load(tmp_path, layout, extra)
    assert "extra.deep.x: float32[3] here, float32[2] in the checkpoint" in str(caught.value)
    assert extra["x"] is array
    np.testing.assert_array_equal(live, before)


@pytest.mark.usefixtures("cupy")
def test_an_array_here_and_something_else_there_is_a_mismatch(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, {"x": 3})
    with pytest.raises(MismatchError, match=r"extra\.x: a tensor here, int in the checkpoint"):
        load(tmp_path, layout, {"x": StandIn(counted("f4", 5))})


PACKED = np.dtype([("flag", "i1"), ("value", "f4")])
ALIGNED = np.dtype({"names": ["value"], "formats": ["f4"], "offsets": [1], "itemsize": 8})


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(
    ("host", "said"),
    [
        (counted("f4", 5)[::-1], "strides are negative"),
        (np.zeros(3, PACKED)["value"], "no multiples of its itemsize"),
        (np.zeros(3, ALIGNED)["value"], "not aligned"),
        (np.zeros(3, PACKED), "torch cannot see"),
        (np.zeros(3, "M8[s]"), "torch cannot see"),
    ],
    ids=["reversed", "packed", "unaligned", "structured", "dates"],
)
def test_an_array_that_no_tensor_can_show_is_refused_by_name(
    tmp_path: Path, host: np.ndarray[Any, Any], said: str
) -> None:
    extra: dict[str, Any] = {"x": StandIn(host)}
    with AsyncCheckpointer(tmp_path, extra=extra) as checkpointer:
        with pytest.raises(LeafError, match=rf"extra\.x.*{said}"):
            checkpointer.save(1)
        extra["x"] = {"y": StandIn(host)}
        with pytest.raises(LeafError, match=rf"extra\.x\.y.*{said}"):
            checkpointer.save(1)
        extra["x"] = StandIn(counted("f4", 3))
        checkpointer.save(1).wait()  # nothing stands in its way


@pytest.mark.usefixtures("cupy")
def test_a_dict_that_holds_itself_and_an_array_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {"x": StandIn(counted("f4", 3))}
    value["self"] = value
    with (
        AsyncCheckpointer(tmp_path, extra={"value": value}) as checkpointer,
        pytest.raises(LeafError, match=r"extra\.value refers to itself"),
    ):
        checkpointer.save(1)


@pytest.mark.usefixtures("cupy")
def test_other_containers_are_left_alone() -> None:
    array = StandIn(counted("f4", 3))
    cyclic: dict[Any, Any] = {1: array}
    cyclic[2] = cyclic
    values = {"list": [array], "tuple": (array,), "odd": {1: array}, "cyclic": cyclic, "plain": {"a": {}}}
    tree = TrainingState(extra=values, rng=False).capture(1)
    assert all(tree["extra"][key] is value for key, value in values.items())
    assert not array.streams
    branch: dict[str, Any] = {"a": 1}
    branch["self"] = branch
    assert not arrays.holds_arrays(branch)


# ---------------------------------------------------------------------------- while training goes on


@pytest.mark.usefixtures("cupy")
def test_the_memory_of_a_large_array_is_kept_until_it_was_copied(tmp_path: Path, layout: str) -> None:
    extra = {"x": StandIn(counted("f4", LARGE))}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout, host_memory=HOST_MEMORY) as checkpointer:
        handle = checkpointer.save(1)
        extra["x"] = StandIn(np.zeros(LARGE, "f4"))
        gc.collect()
        handle.wait()
        checkpointer.load(1)
    np.testing.assert_array_equal(extra["x"].host, counted("f4", LARGE))


@pytest.mark.usefixtures("cupy")
def test_a_small_array_may_change_after_save(tmp_path: Path, layout: str) -> None:
    extra = {"x": StandIn(counted("f4", 100))}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        handle = checkpointer.save(1)
        extra["x"].host[...] = 0
        handle.wait()
        checkpointer.load(1)
    np.testing.assert_array_equal(extra["x"].host, counted("f4", 100))


@pytest.mark.usefixtures("cupy")
def test_the_full_guard_sees_a_large_array_change(tmp_path: Path, layout: str) -> None:
    from asyncckpt._native import faults

    extra = {"x": StandIn(counted("f4", LARGE))}
    with AsyncCheckpointer(
        tmp_path, extra=extra, layout=layout, host_memory=HOST_MEMORY, guard="full"
    ) as checkpointer:
        faults.arm(faults.Op.copy, 0, faults.Kind.pause)
        try:
            handle = checkpointer.save(1)
            assert faults.wait_for_hits(faults.Op.copy, 1)
            extra["x"].host[-1] = 0
        finally:
            faults.disarm()
        with pytest.raises(TornStateError, match=r"extra\.x"):
            handle.wait()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    double = Double()
    double.reset(seed=5, delay_us_max=50)
    with FakeCuda(double) as world:
        monkeypatch.setattr(devices, "seam", world)
        yield world
    double.reset()


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("elements", [100, LARGE])
def test_arrays_in_device_memory(tmp_path: Path, layout: str, elements: int, world: FakeCuda) -> None:
    values = torch.arange(1.0, 1 + elements)
    array = StandIn(world.to_device(values))
    extra: dict[str, Any] = {"x": array, "deep": {"y": array}}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout, host_memory=HOST_MEMORY) as checkpointer:
        checkpointer.save(1).wait()
        assert world.double.copied_nbytes(to_host=True) >= elements * 4
        array.host.zero_()
        checkpointer.load(1)
    assert extra["x"] is extra["deep"]["y"] is array
    assert torch.equal(world.to_host(array.host), values)


# ---------------------------------------------------------------------------- streams


class FakeStreams:
    """torch's streams and current device, as far as `arrays` asks for them; torch here may have no CUDA.

    Attributes:
        device: the current one.
        current: handle of torch's current stream.
        waits: (device, stream that waits, stream it waits for).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = 0
        self.current = 0
        self.waits: list[tuple[int, int, int]] = []
        for name in ("current_stream", "default_stream"):
            handle = (lambda: self.current) if name == "current_stream" else (lambda: 0)
            monkeypatch.setattr(torch.cuda, name, lambda device, handle=handle: self.stream(handle()))
        monkeypatch.setattr(torch.cuda, "ExternalStream", self.external)
        monkeypatch.setattr(torch.cuda, "device", self.switch)

    def external(self, handle: int, device: int) -> SimpleNamespace:
        assert handle != 0, "for 0, torch gives out a stream of its pool"
        assert device == self.device
        return self.stream(handle)

    def stream(self, handle: int) -> SimpleNamespace:
        def wait_stream(other: SimpleNamespace) -> None:
            self.waits.append((self.device, handle, other.cuda_stream))

        return SimpleNamespace(cuda_stream=handle, wait_stream=wait_stream)

    @contextmanager
    def switch(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    return FakeStreams(monkeypatch)


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(("current", "named"), [(0, 1), (0x70, 0x70)])
def test_an_array_is_told_torchs_stream_while_its_device_is_current(
    streams: FakeStreams, current: int, named: int
) -> None:
    at: list[int] = []

    class OnDevice(StandIn):
        def __dlpack__(self, **options: Any) -> Any:
            at.append(streams.device)
            return super().__dlpack__(**options)

    streams.current = current
    array = OnDevice(counted("f4", 5), kind=2)
    arrays.as_tensor("x", array)
    assert (array.streams, at, streams.device) == ([named], [3], 0)  # DLPack calls the default stream 1


@pytest.mark.usefixtures("cupy")
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a torch that has no CUDA")
def test_a_torch_without_cuda_is_told_by_name(tmp_path: Path) -> None:
    with (
        AsyncCheckpointer(tmp_path, extra={"x": StandIn(counted("f4", 5), kind=2)}) as checkpointer,
        pytest.raises(LeafError, match=r"extra\.x: a CuPy array that torch cannot see"),
    ):
        checkpointer.save(1)


@pytest.mark.parametrize(
    ("theirs", "ours", "waits"),
    [
        (0, 0, []),
        (1, 0, []),
        (0x50, 0x50, []),
        (0x50, 0, [(3, 0x50, 0)]),
        (2, 0, [(3, 2, 0)]),
        (0, 0x70, [(3, 0, 0x70)]),
        (0x50, 0x70, [(3, 0x50, 0x70)]),
    ],
)
def test_cupys_stream_waits_for_torchs(
    cupy: SimpleNamespace, streams: FakeStreams, theirs: int, ours: int, waits: list[tuple[int, int, int]]
) -> None:
    def get_current_stream() -> SimpleNamespace:
        assert streams.device == 3  # it is asked without a device: CuPy takes the current one
        return SimpleNamespace(ptr=theirs)

    cupy.cuda = SimpleNamespace(get_current_stream=get_current_stream)
    streams.current = ours
    arrays.order_after_torch({devices.HOST, 3})
    assert streams.waits == waits


class OnCuda(torch.Tensor):
    """Says that it is on a device."""

    def get_device(self) -> int:
        return 3


@pytest.mark.usefixtures("cupy")
def test_cupy_is_held_back_where_extra_has_arrays_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[set[int]] = []
    monkeypatch.setattr(arrays, "order_after_torch", lambda used: waited.append(set(used)))
    monkeypatch.setattr(arrays, "from_dlpack", lambda array: torch.ones(2).as_subclass(OnCuda))
    extra: dict[str, Any] = {"deep": {"x": StandIn(counted("f4", 2))}}
    state = TrainingState(extra=extra, rng=False)
    state.capture(1)
    state.hold_back_arrays()
    extra.clear()
    state.capture(2)
    state.hold_back_arrays()
    TrainingState(extra=SimpleNamespace(state_dict=dict, load_state_dict=id)).hold_back_arrays()
    assert waited == [{3}, set()]


@pytest.mark.usefixtures("cupy")
def test_save_and_fence_hold_cupy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(TrainingState, "hold_back_arrays", lambda self: calls.append("held back"))
    with AsyncCheckpointer(tmp_path, extra={"x": StandIn(counted("f4", 3))}) as checkpointer:
        handle = checkpointer.save(1)
        calls.append("saved")
        checkpointer.fence(on_host=False)
        calls.append("fenced")
        checkpointer.fence()  # the host waited: whatever comes now is late enough
        handle.wait()
        checkpointer.fence(on_host=False)  # for nothing
    assert calls == ["held back", "saved", "held back", "fenced"]


@pytest.mark.usefixtures("cupy")
def test_after_a_load_cupy_waits_for_what_torch_copied(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = StandIn(counted("f4", 6)[::2])  # gaps: the values take a detour through torch
    save(tmp_path, layout, {"x": array})
    array.host[...] = 0
    seen: list[list[float]] = []
    monkeypatch.setattr(arrays, "order_after_torch", lambda used: seen.append(array.host.tolist()))
    load(tmp_path, layout, {"x": array})
    assert seen == [[1, 3, 5]]


# ---------------------------------------------------------------------------- without CuPy


@contextmanager
def imports_noted() -> Iterator[list[str]]:
    """Names of the modules that are asked for and were not imported before."""
    asked: list[str] = []

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            asked.append(name)

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield asked
    finally:
        sys.meta_path.remove(finder)


def test_cupy_is_not_imported_for_anybody(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    extra = {"x": torch.ones(3), "deep": {"y": np.ones(3)}, "note": "n"}
    with imports_noted() as asked:
        save(tmp_path, layout, extra)
        load(tmp_path, layout, extra)
        with pytest.raises(ImportError):
            __import__("a_module_that_nobody_has")
    assert "a_module_that_nobody_has" in asked  # the finder is asked
    assert not [name for name in asked if name.startswith("cupy")]


def test_a_cupy_that_is_half_imported_has_no_arrays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())  # type: ignore[arg-type]
    extra: dict[str, Any] = {"x": torch.ones(3), "deep": {"y": 1}}
    save(tmp_path, layout, extra)
    load(tmp_path, layout, extra)
    assert extra["deep"] == {"y": 1}


# ---------------------------------------------------------------------------- NumPy


NUMPY: dict[str, Callable[[], Any]] = {
    **{dtype: lambda dtype=dtype: counted(dtype, 3, 5) for dtype in DTYPES},  # type: ignore[misc]
    "scalar": lambda: np.float32(1.5),
    "zero dimensions": lambda: counted("f8"),
    "empty": lambda: counted("i4", 0, 3),
    "fortran": lambda: np.asfortranarray(counted("f4", 3, 4)),
    "reversed": lambda: counted("f4", 5)[::-1],
    "big endian": lambda: counted(">i4", 5),
    "structured": lambda: np.array([(1, 2.5), (3, 4.5)], PACKED),
    "text": lambda: np.array(["one", "zwei"]),
    "dates": lambda: np.array(["2024-02-29"], "M8[D]"),
    "large": lambda: counted("f4", LARGE),
}


@pytest.mark.parametrize("make", NUMPY.values(), ids=NUMPY.keys())
def test_numpy_arrays_come_back_as_numpy_arrays(tmp_path: Path, layout: str, make: Callable[[], Any]) -> None:
    """They are python leaves: pickled in save(), and replaced by new ones on load."""
    mine = make()
    extra: dict[str, Any] = {"x": mine, "deep": {"list": [make()], "tuple": (1, make())}}
    save(tmp_path, layout, extra)
    if isinstance(mine, np.ndarray):
        mine[...] = np.zeros((), mine.dtype)
    load(tmp_path, layout, extra)
    for found in (extra["x"], extra["deep"]["list"][0], extra["deep"]["tuple"][1]):
        assert type(found) is type(mine)
        assert found.dtype.newbyteorder("=") == mine.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, make())
    if isinstance(mine, np.ndarray):
        assert extra["x"] is not mine
        np.testing.assert_array_equal(mine, np.zeros_like(mine))  # the old one is nobody's business


def test_a_numpy_array_may_change_after_save(tmp_path: Path, layout: str) -> None:
    extra = {"x": counted("f4", LARGE)}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout, host_memory=HOST_MEMORY) as checkpointer:
        handle = checkpointer.save(1)
        extra["x"][...] = 0
        handle.wait()
        checkpointer.load(1)
    np.testing.assert_array_equal(extra["x"], counted("f4", LARGE))


# ---------------------------------------------------------------------------- on a GPU


@pytest.fixture
def real() -> Any:
    """CuPy itself, and the device under it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and a torch that sees it")
    return pytest.importorskip("cupy", reason="needs CuPy", exc_type=ImportError)


DELAY_CYCLES = 200_000_000  # a tenth of a second of a GPU's clock: longer than save() takes to be called


def busy(cupy: Any) -> Callable[[], None]:
    """What keeps CuPy's current stream busy for a while; compiled and run once."""
    kernel = cupy.RawKernel(
        'extern "C" __global__ void spin(long long cycles) {'
        " long long begin = clock64(); while (clock64() - begin < cycles) {} }",
        "spin",
    )
    kernel((1,), (1,), (np.int64(1),))
    cupy.cuda.Device().synchronize()
    return lambda: kernel((1,), (1,), (np.int64(DELAY_CYCLES),))


@pytest.mark.gpu
def test_cupy_arrays_of_every_dtype(tmp_path: Path, layout: str, real: Any) -> None:
    values = {dtype: counted(dtype, 3, 5) for dtype in DTYPES}
    values["transposed"] = counted("f4", 3, 4).T
    extra: dict[str, Any] = {name: real.asarray(value) for name, value in values.items()}
    extra["deep"] = {"y": real.asarray(counted("f4", 7))}
    live = {**extra, "y": extra["deep"]["y"]}
    save(tmp_path, layout, extra)
    like = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
    found = read_by_stock(tmp_path, layout, like)
    for name, tensor in like.items():
        assert torch.equal(found[name].contiguous(), tensor)
    for name, array in live.items():
        if name != "deep":
            array.fill(0)
    load(tmp_path, layout, extra)
    for name, value in values.items():
        assert extra[name] is live[name]
        np.testing.assert_array_equal(real.asnumpy(live[name]), value)
    assert extra["deep"]["y"] is live["y"]
    np.testing.assert_array_equal(real.asnumpy(live["y"]), counted("f4", 7))


@pytest.mark.gpu
@pytest.mark.parametrize("torchs", ["default", "side"])
@pytest.mark.parametrize("cupys", ["default", "side"])
def test_what_cupys_stream_has_for_an_array_comes_before_the_save(
    tmp_path: Path, layout: str, real: Any, cupys: str, torchs: str
) -> None:
    extra = {"x": real.zeros(1 << 20, "f4")}
    wait_a_while = busy(real)
    theirs = real.cuda.Stream.null if cupys == "default" else real.cuda.Stream(non_blocking=True)
    ours = torch.cuda.default_stream() if torchs == "default" else torch.cuda.Stream()
    with (
        AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer,
        theirs,
        torch.cuda.stream(ours),
    ):
        wait_a_while()
        extra["x"] += 1
        checkpointer.save(1).wait()
        extra["x"].fill(0)
        wait_a_while()
        extra["x"].fill(5)  # late: the load must not be overtaken by it
        checkpointer.load(1)
        found = real.asnumpy(extra["x"])
    np.testing.assert_array_equal(found, np.ones(1 << 20))


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [1 << 10, 1 << 24])  # the one is copied inside save(), the other is not
def test_what_cupy_does_after_the_save_comes_after_the_copies(
    tmp_path: Path, layout: str, real: Any, elements: int
) -> None:
    extra = {"x": real.arange(elements, dtype="f4")}
    with (
        AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer,
        real.cuda.Stream(non_blocking=True),
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        torch.cuda._sleep(DELAY_CYCLES)  # so that nothing is copied before CuPy may write
        handle = checkpointer.save(1)
        if elements > 1 << 20:
            checkpointer.fence(on_host=False)
        extra["x"].fill(0)
        handle.wait()
        checkpointer.load(1)
        found = real.asnumpy(extra["x"])
    np.testing.assert_array_equal(found, np.arange(elements, dtype="f4"))


@pytest.mark.gpu
def test_a_load_is_there_for_cupys_next_kernel(tmp_path: Path, layout: str, real: Any) -> None:
    whole = real.arange(1 << 22, dtype="f4")
    extra = {"x": whole[::2]}  # gaps: the values take a detour through torch
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        with real.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
            extra["x"].fill(0)
            checkpointer.load(1)
            found = real.asnumpy(extra["x"] + 1)
    np.testing.assert_array_equal(found, np.arange(1, 1 + (1 << 22), 2, dtype="f4"))


@pytest.mark.gpu
def test_a_reversed_cupy_array_is_refused_by_name(tmp_path: Path, real: Any) -> None:
    with (
        AsyncCheckpointer(tmp_path, extra={"x": real.arange(5, dtype="f4")[::-1]}) as checkpointer,
        pytest.raises(LeafError, match=r"extra\.x: the array's strides are negative"),
    ):
        checkpointer.save(1)
