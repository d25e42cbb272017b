"""Pickling without touching bytes, and unpickling without running anything."""

from __future__ import annotations

import argparse
import copyreg
import ctypes
import functools
import io
import math
import mmap
import os
import pickle
import random
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from asyncckpt.errors import LeafError
from asyncckpt.formats import unpickle as unpickle_room
from asyncckpt.formats.inert import Inert
from asyncckpt.formats.pickles import BadPickleError, TensorRef, find_inert, pickle_tree, unpickle
from asyncckpt.formats.refs import StorageRef
from asyncckpt.tree import tensors_in
from tests.strategies import Colour, Settings, harmless, same

# ---------------------------------------------------------------------------- pickling


class Callback:
    """An object with an attribute that cannot be pickled."""

    def __init__(self) -> None:
        self.every = 10
        self.fn = lambda: None


class Endless:
    def __reduce__(self) -> str:
        raise MemoryError


class Stubborn:
    """An object that refuses to be pickled, in its own words."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


def deep(depth: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"callbacks": [1, 2, Callback()]}, r"^extra\.callbacks\[2\]\.fn cannot be saved: function"),
        ({"a b": (Stubborn(),)}, r"^extra\['a b'\]\[0\] cannot be saved: Stubborn: not today"),
        ({"x": [Endless()]}, r"^extra\.x\[0\] cannot be saved: Endless: MemoryError$"),  # which says nothing
        ({"x": {3: (i for i in "")}}, r"^extra\.x\[3\] cannot be saved: generator"),
        ({"x": {lambda: 0: 1}}, r"^extra\.x\.key\(function\) cannot be saved"),
        ({"x": deep(100_000)}, r"^extra\.x\[0\]\[0\].* nested too deeply"),
        (lambda: 0, "^extra cannot be saved: function"),
    ],
)
def test_the_leaf_that_cannot_be_pickled_is_named(tree: Any, message: str):
    with pytest.raises(LeafError, match=message) as raised:
        pickle_tree(tree, where="extra")
    assert len(str(raised.value)) < 300


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_a_quantised_tensor_is_named():
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(LeafError, match=r"^model\.blocks\[1\]\.weight cannot be saved: Tensor: a quantised"):
        pickle_tree({"blocks": [{}, {"weight": quantised}]}, where="model")


def test_one_memory_seen_as_two_dtypes_is_named():
    floats = torch.ones(4)
    tree = {"first": floats, "others": [floats[:2].clone(), floats.view(torch.int32)]}
    with pytest.raises(RuntimeError, match="different types"):
        torch.save(tree, io.BytesIO())
    with pytest.raises(
        LeafError, match=r"state\.first \(torch.float32\) and state\.others\[1\] \(torch.int32"
    ):
        pickle_tree(tree, where="state")


def test_no_byte_of_a_storage_is_touched():
    """The memory is out of bounds while it is pickled: a read would be fatal."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    tensor = torch.frombuffer(memory, dtype=torch.float32)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    assert libc.mprotect(address, mmap.PAGESIZE, 0) == 0
    try:
        pickled = pickle_tree({"a": tensor[3:], "b": torch.nn.Parameter(tensor)}, where="state")
    finally:
        assert libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert [storage.nbytes() for storage in pickled.storages] == [mmap.PAGESIZE]


def test_every_tensor_is_reported_once_and_its_memory_is_held():
    weight = torch.nn.Parameter(torch.ones(3))
    tree = {"weight": weight, "tied": weight, "view": weight.detach()[1:], "step": torch.tensor(1.0)}
    pickled = pickle_tree(tree, where="state")
    assert [id(tensor) for tensor in pickled.tensors] == [id(tree[key]) for key in ("weight", "view", "step")]
    with torch.no_grad():
        weight.add_(1)  # what guards look for
    assert [tensor._version for tensor in pickled.tensors] == [1, 1, 0]
    pointers = [storage.data_ptr() for storage in pickled.storages]
    assert pointers == [weight.data_ptr(), tree["step"].data_ptr()]


class Tagged(torch.Tensor):
    """A plain subclass."""


def hooked(tensor: torch.Tensor) -> torch.Tensor:
    tensor.register_hook(torch.utils.hooks.unserializable_hook(lambda grad: grad))
    return tensor


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).as_subclass(Tagged),
        lambda: with_attribute(torch.ones(2)),
        lambda: with_attribute(torch.nn.Parameter(torch.ones(2))),
        lambda: hooked(torch.ones(2, requires_grad=True)),
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,  # stored negated
        lambda: torch.empty(2, device="meta"),
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.ones(2).untyped_storage(),
        lambda: [torch.ones(2, dtype=torch.uint16), torch.nn.Buffer(torch.zeros(1))],
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*prototype stage.*:UserWarning")
def test_unusual_tensors_pickle_as_torch_pickles_them(make: Callable[[], Any]):
    """Those that do not take the short way."""
    tree = make()
    assert pickle_tree(tree, where="tree").data == pickled_by_torch(tree)


def pickled_by_torch(tree: Any) -> bytes:
    stock = io.BytesIO()
    torch.save(tree, stock)
    with torch.serialization._open_zipfile_reader(io.BytesIO(stock.getvalue())) as archive:
        return bytes(archive.get_record("data.pkl"))


@pytest.mark.parametrize(
    "value",
    [
        7, "epoch", None, (), [], random.getstate(), ["layer.weight"] * 3, ["a", ["b", b"c"], (1.5, True)],
        [Colour.RED, (1, 2)], [["deeper", ["still"]]],
    ],
)  # fmt: skip
def test_plain_values_pickle_as_torch_pickles_them(value: Any):
    assert pickle_tree(value, where="value").data == pickled_by_torch(value)


class Lazy(dict[str, Any]):
    """Its values can be gone through once for each call, as some libraries' mappings have it."""

    def values(self) -> Any:
        return (self[key] for key in self)


def test_tensors_are_found_in_mappings_whose_values_come_one_by_one():
    tensors = [torch.ones(1), torch.zeros(1)]
    found = list(tensors_in({"x": Lazy(zip("ab", tensors, strict=True))}))
    assert list(map(id, found)) == list(map(id, tensors))


def test_a_plain_value_that_cannot_be_pickled_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> bytes:
        raise OverflowError("int too large to pickle")  # as for one of 2 GiB

    monkeypatch.setattr(pickle, "dumps", refuse)
    with pytest.raises(LeafError, match=r"extra\.x"):
        pickle_tree(7, where="extra.x")


@pytest.mark.parametrize("wrap", [lambda t: (1, t), lambda t: ["a", (2, t)], lambda t: [("a", [3, [t]])]])
def test_a_tensor_among_plain_values_is_found(wrap: Callable[[Any], Any]):
    tensor = torch.ones(2)
    found = pickle_tree(wrap(tensor), where="value")
    assert [storage.data_ptr() for storage in found.storages] == [tensor.data_ptr()]
    assert found.tensors == (tensor,)


def test_tensors_with_a_reducer_of_the_users_own_keep_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(copyreg.dispatch_table, torch.Tensor, lambda tensor: (list, (tensor.tolist(),)))
    assert pickle.loads(pickle_tree(torch.ones(2), where="tree").data) == [1.0, 1.0]


# ---------------------------------------------------------------------------- unpickling: what is allowed


@settings(max_examples=300, deadline=None)
@given(harmless())
def test_harmless_leaves_come_back_equal(leaf: Any):
    for protocol in (2, pickle.HIGHEST_PROTOCOL - 1):
        data = pickle.dumps({"leaf": (leaf, [leaf])}, protocol=protocol)
        tree = unpickle(data)
        assert find_inert(tree) is None
        if not (isinstance(leaf, float) and math.isnan(leaf)):
            assert same({"leaf": (leaf, [leaf])}, tree)
        assert tree["leaf"][0] is tree["leaf"][1][0] or not isinstance(leaf, (list, dict, np.ndarray))


def test_both_spellings_of_numpys_core_are_known():
    for protocol_2 in (pickle.dumps(np.arange(3), 2), pickle.dumps(np.float32(2), 2)):
        other = protocol_2.replace(b"numpy._core.", b"numpy.core.")
        assert other != protocol_2 or b"numpy.core." in protocol_2
        assert same(unpickle(other), pickle.loads(protocol_2))


def test_arrays_of_objects_are_plain_containers():
    array = np.array([{"a": np.arange(2)}, None, "x"], dtype=object)
    tree = unpickle(pickle.dumps(array, 2))
    assert tree.dtype == object
    assert same(tree[0], array[0])
    assert tree[1:].tolist() == [None, "x"]


def test_a_tree_that_contains_itself_comes_back():
    tree: dict[str, Any] = {"array": np.arange(3)}
    tree["self"] = [tree]
    back = unpickle(pickle.dumps(tree, 2))
    assert back["self"][0] is back
    assert back["array"].tolist() == [0, 1, 2]


def test_unknown_classes_come_back_inert_with_what_they_held():
    tree = {
        "args": argparse.Namespace(lr=0.1, seed=[1, np.int64(2)]),
        "settings": [Settings("sgd")],
        "colour": Colour.BLUE,
        "partial": functools.partial(print, 1),
    }
    back = unpickle(pickle.dumps(tree, 2))
    assert back["args"].state == {"lr": 0.1, "seed": [1, 2]}
    assert (back["args"].module, back["args"].name) == ("argparse", "Namespace")
    assert back["settings"][0].state["name"] == "sgd"
    assert back["colour"].args == ("blue",)
    assert find_inert(back) == (".args", "argparse.Namespace")
    assert find_inert({"ok": [1, {"x y": back["colour"]}]}) == (".ok[1]['x y']", "tests.strategies.Colour")
    assert find_inert({"a": 1, "b": [torch.float32, (np.arange(2),)]}) is None
    trusted = unpickle(pickle.dumps(tree, 2), trusted=True)
    assert (trusted["args"], trusted["settings"]) == (tree["args"], tree["settings"])


def test_a_class_as_a_value_is_found_too():
    assert find_inert(unpickle(pickle.dumps([Settings], 2))) == ("[0]", "tests.strategies.Settings")


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02}q\x00(X", b"garbage", b"\x80\x63.", b"."])
def test_a_garbled_pickle_is_a_clear_error(data: bytes):
    with pytest.raises(BadPickleError, match=r"empty|cannot be unpickled"):
        unpickle(data)


# ---------------------------------------------------------------------------- unpickling: what is not


class Call:
    """Pickles as a call of a global."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


MARKER = "marker-of-a-pickle-that-ran"
TOUCH = f"open({MARKER!r}, 'w').close()"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# Each of these leaves MARKER in the working directory when the stock unpickler reads it.
HOSTILE = {
    "system": pickle.dumps(Call(os.system, f"touch {MARKER}"), 2),
    "eval": pickle.dumps(Call(eval, TOUCH), 2),
    "exec": pickle.dumps(Call(exec, TOUCH), 4),
    "path": pickle.dumps(Call(Path.touch, Path(MARKER)), 4),
    "pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(exec, TOUCH))), 4),
    "map": pickle.dumps(Call(list, Call(map, eval, [TOUCH])), 2),
    "partial": pickle.dumps(Call(functools.partial(eval, TOUCH)), 2),
    "setstate": pickle.dumps(Call(functools.partial, print, state=(eval, (TOUCH,), {}, None)), 2)[:-1]
    + b")R.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\n"
    + text("os") + b"\x85R" + text("system") + b"\x86R" + text(f"touch {MARKER}") + b"\x85R.",
    "inst": f"(S'touch {MARKER}'\nios\nsystem\n.".encode(),
    "dotted": b"\x80\x04" + text("pathlib") + text("Path.touch") + b"\x93"
    + pickle.dumps(Path(MARKER), 4)[2:-1] + b"\x85R.",
    "torch": b"\x80\x02ctorch.utils.collect_env\nrun\n" + text(f"touch {MARKER}") + b"\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    with suppress(BadPickleError):
        assert find_inert(unpickle(data)) is not None
    assert not Path(MARKER).exists()
    assert set(sys.modules) == before
    for run in (pickle.loads, functools.partial(unpickle, trusted=True)):  # the pickle does what it says
        run(data)
        assert Path(MARKER).exists()
        Path(MARKER).unlink()


def test_no_module_is_imported():
    sys.modules.pop("this", None)
    for data in (b"\x80\x02cthis\ns\n.", b"\x80\x04" + text("this") + text("s") + b"\x93."):
        assert find_inert(unpickle(data)) == ("", "this.s")
    with pytest.raises(BadPickleError, match="unknown encoding"):
        unpickle(b"\x80\x02c_codecs\nencode\n" + text("a") + text("utf_7") + b"\x86R.")
    assert "this" not in sys.modules
    assert "encodings.utf_7" not in sys.modules


@pytest.mark.parametrize("is_cached", [False, True])
def test_extension_codes_are_refused(is_cached: bool):
    """They name a global by number; the interpreter's cache of them would hand it out unseen."""
    copyreg.add_extension("builtins", "eval", 240)  # type: ignore[no-untyped-call]
    try:
        if is_cached:
            assert pickle.loads(b"\x80\x02\x82\xf0.") is eval
        with pytest.raises(BadPickleError, match="extension code"):
            unpickle(b"\x80\x02\x82\xf0.")
        assert unpickle(b"\x80\x02K\x01.") == 1
    finally:
        copyreg.remove_extension("builtins", "eval", 240)  # type: ignore[no-untyped-call]


TABLES = {**unpickle_room._PLAIN_TABLE, **unpickle_room._TENSOR_TABLE, **unpickle_room._NUMPY_TABLE}


@pytest.mark.parametrize("state", [(None, {"hacked": 1}), {"hacked": 1}])
def test_no_global_can_be_changed(state: Any):
    """BUILD sets attributes on whatever it is given, classes included."""
    build = pickle.dumps(state, 2)[2:-1]
    for module, name in TABLES:
        handed_out = unpickle(f"\x80\x02c{module}\n{name}\n.".encode("latin1"))
        with pytest.raises(BadPickleError):
            unpickle(f"\x80\x02c{module}\n{name}\n".encode("latin1") + build + b"b.")
        assert not hasattr(handed_out, "hacked"), (module, name)
    with pytest.raises(BadPickleError):
        unpickle(b"\x80\x02cos\nsystem\n" + build + b"b.")
    assert not hasattr(Inert, "hacked")


def test_a_builtin_dtype_cannot_be_changed():
    """numpy shares its dtypes; the stock unpickler would let a pickle swap the bytes of all float64."""
    state = pickle.dumps((3, ">", None, None, None, -1, -1, 0), 2)[2:-1]
    data = b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x89\x87R" + state + b"b."
    assert unpickle(data) == np.dtype(">f8")
    assert np.arange(2.0).dtype.byteorder == "="


def test_raw_bytes_never_become_object_pointers():
    raw = b"A" * 16
    stock = pickle.dumps(np.array([None, None], dtype=object), 2)
    state = pickle.dumps((1, (2,), np.dtype("O"), False, raw), 2)[2:-1]
    data = stock[: stock.index(b"(K\x01K\x02\x85")] + state.replace(b"q\x00", b"q\xf0") + b"b."
    tree = unpickle(data)
    assert isinstance(tree, Inert)


def test_a_tensor_ref_cannot_be_changed_or_leave_its_storage():
    def find(key: str, dtype: torch.dtype, location: str, nbytes: int) -> StorageRef:
        return StorageRef(4096, nbytes, key, dtype, location)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is storage else None

    storage = object()

    def pickled(offset: int, size: Any, stride: Any, state: Any = None) -> bytes:
        rebuild = Call(
            torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None, state=state
        )
        sink = io.BytesIO()
        Pickler(sink, 2).dump(rebuild)
        return sink.getvalue()

    ref = unpickle(pickled(0, (2, 2), (2, 1)), find)
    assert ref == TensorRef(4096, 16, "0", torch.float32, (2, 2), (2, 1), 0, False, False, False, False)
    for state in ({"data_offset": 0}, (None, {"data_offset": 0})):
        with pytest.raises(BadPickleError):
            unpickle(pickled(0, (2, 2), (2, 1), state), find)
    for offset, size, stride in (
        (0, (5,), (1,)), (1, (2, 2), (2, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2,), ()),
        (0, (2**62, 2**62), (1, 1)), (0, ("2",), (1,)), (0, (2.0,), (1,)),
    ):  # fmt: skip
        with pytest.raises(BadPickleError):
            unpickle(pickled(offset, size, stride), find)
    with pytest.raises(BadPickleError, match="only plain objects"):
        unpickle(pickled(0, (2,), (1,)))


def test_every_reading_has_its_own_classes():
    """One file cannot leave a trap for the next."""
    data = pickle.dumps([Settings()], 2)
    assert type(unpickle(data)[0]) is not type(unpickle(data)[0])
