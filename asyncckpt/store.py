"""A client of a torch.distributed store that keeps to deadlines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from .errors import RankError

_Result = TypeVar("_Result")

_KEYS_PER_CALL = 1024  # of a multi_get: 16,384 at once would take half a second, and hold up the heart
_LARGE_PER_CALL = 64
_VALUE_NBYTES_MAX = 4 << 20  # TCPStore refuses values of more than 8 MiB
CALL_TIMEOUT_S = 30.0  # a store that answers no single call for so long is gone


class Store(Protocol):
    """What is needed of a torch.distributed.Store."""

    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def delete_key(self, key: str, /) -> bool: ...


class StoreClient:
    """Calls of a store that cannot hang their caller.

    Args:
        store: any torch.distributed store. A client of our own is made of it where it can be: a blocking call
            of somebody else's holds a shared one for seconds.
        prefix: of all keys.
        host: whose process hosts the store, as far as one can guess.

    Thread-safe. A call that its deadline overtook is left behind with its thread and its connection; the next
    one gets new ones.
    """

    def __init__(self, store: Any, prefix: str, host: str = "the process that hosts it") -> None:
        self._prefix = prefix
        self._host = host
        self._shared: Any = store
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the thread. Later calls begin a new one."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def raw(self, key: str) -> Any:
        """A torch.distributed store of its own below a key, for those who need one. Its calls may hang."""
        return dist.distributed_c10d.PrefixStore(self._prefix + key, _own_client(self._shared))

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda store: store.set(self._prefix + key, value))

    def get(self, key: str) -> bytes:
        """Of a key that is known to be there."""
        return bytes(self._call(lambda store: store.get(self._prefix + key)))

    def has(self, *keys: str) -> bool:
        """Whether all of them are there."""
        return bool(self._call(lambda store: store.check([self._prefix + key for key in keys])))

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """Of keys that are known to be there."""
        found: list[bytes] = []
        for some in _batches([self._prefix + key for key in keys], _KEYS_PER_CALL):
            found += self._call(partial(_multi_get, some))
        return found

    def absent(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there, in few calls where they are few."""
        if not keys or self.has(*keys):
            return []
        if len(keys) == 1:
            return list(keys)
        half = len(keys) // 2
        return self.absent(keys[:half]) + self.absent(keys[half:])

    def add(self, key: str, amount: int) -> int:
        return int(self._call(lambda store: store.add(self._prefix + key, amount)))

    def delete(self, *keys: str) -> None:
        """What is not there may be missing; a store that cannot delete keeps its keys."""

        def delete(store: Any) -> None:
            for key in keys:
                try:
                    store.delete_key(self._prefix + key)
                except (RuntimeError, NotImplementedError):
                    return

        self._call(delete)

    def put_large(self, key: str, value: bytes) -> list[str]:
        """Values of any size; `get_large` and `take_large` read them. The key itself appears last.

        Returns:
            all keys that it takes.
        """
        first, *rest = (
            value[at : at + _VALUE_NBYTES_MAX] for at in range(0, len(value) or 1, _VALUE_NBYTES_MAX)
        )
        for index, piece in enumerate(rest):
            self.set(f"{key}/{index}", piece)
        self.set(key, b"%d " % len(rest) + first)
        return [key, *(f"{key}/{index}" for index in range(len(rest)))]

    def get_large(self, key: str) -> bytes:
        """What `put_large` put there; the key is known to be there, and stays."""
        return self._whole(key, self.get(key))[0]

    def take_large(self, keys: Sequence[str]) -> Iterator[bytes]:
        """What `put_large` put there; the keys are known to be there, and are gone afterwards."""
        for some in _batches(keys, _LARGE_PER_CALL):
            wholes = [self._whole(key, data) for key, data in zip(some, self.get_all(some), strict=True)]
            self.delete(*some, *(piece for _, pieces in wholes for piece in pieces))
            yield from (value for value, _ in wholes)

    def _whole(self, key: str, data: bytes) -> tuple[bytes, list[str]]:
        """The value, and the keys besides its own that hold the rest of it."""
        count, _, first = data.partition(b" ")
        keys = [f"{key}/{index}" for index in range(int(count))]
        return b"".join([first, *(self.get(piece) for piece in keys)]), keys

    def _call(self, function: Callable[[Any], _Result]) -> _Result:
        with self._lock:
            worker = self._worker = self._worker or _Worker(self._shared)
        answer = worker.ask(function)
        if not answer.came.wait(CALL_TIMEOUT_S):
            with self._lock:
                if self._worker is worker:
                    self._worker = None
            raise RankError(f"the store has not answered for {CALL_TIMEOUT_S:g} s: is {self._host} stopped?")
        if answer.error is not None:
            raise RankError(
                f"the store cannot be reached: is {self._host} dead? ({answer.error})"
            ) from answer.error
        result: _Result = answer.result
        return result


class _Answer:
    def __init__(self) -> None:
        self.came = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None


class _Worker:
    """A thread with a client of the store, that makes one call after the other."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], _Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="asyncckpt-store", daemon=True)
        self._thread.start()

    def ask(self, function: Callable[[Any], Any]) -> _Answer:
        answer = _Answer()
        self._calls.put((function, answer))
        return answer

    def end(self) -> None:
        # A thread that is inside the store when the interpreter goes takes the process down with it.
        self._calls.put(None)
        self._thread.join(CALL_TIMEOUT_S)

    def _run(self) -> None:
        store = None
        while (item := self._calls.get()) is not None:
            function, answer = item
            try:
                if store is None:
                    store = _own_client(self._shared)
                answer.result = function(store)
            except Exception as error:  # noqa: BLE001 -- a store's errors have no common class
                answer.error = error
            answer.came.set()


def _multi_get(keys: list[str], store: Store) -> list[bytes]:
    return store.multi_get(keys)


def _batches(keys: Sequence[str], size: int) -> Iterator[list[str]]:
    return (list(keys[at : at + size]) for at in range(0, len(keys), size))


def _own_client(store: Any) -> Any:
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):  # an older torch, or a store of another kind
        return store
