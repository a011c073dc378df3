"""Files that become visible together, when all of them are on disk."""

import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from converters.chunks import CHUNK, chunks
from converters.safetensors_header import Spec

LARGE = 256 << 20
"""Bytes above which progress is shown."""
FLUSH = 128 << 20
"""Bytes after which the disk is asked to begin with them."""


class Shards:
    """The files of one set of weights, in a hidden folder beside their final place until all are.

    A write that fails leaves nothing behind, except where it may be resumed: then complete shards
    stay in the hidden folder, with their hashes.
    """

    def __init__(self, path: Path, total: int, resume: str | None):
        self.target, self.resume = path.parent, resume
        self.folder = path.parent / f".{path.stem}.partial"
        self._journal: dict[str, dict[str, str]] = {}
        self._names: list[str] = []
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=None if total >= LARGE else True,
        )

    def __enter__(self) -> "Shards":
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise OSError(f"another process is writing {self.folder}; wait for it") from None
        journal = self.folder / "journal.json"
        if self.resume is not None and journal.is_file():
            try:
                self._journal = json.loads(journal.read_bytes())
            except ValueError:
                self._journal = {}
        return self

    def write(
        self,
        name: str,
        header: bytes,
        specs: Mapping[str, Spec],
        read: Callable[[str], np.ndarray | Iterable[np.ndarray]],
    ) -> None:
        """Writes one shard, unless an earlier write of the same left it complete."""
        self._names.append(name)
        size = len(header) + sum(s.nbytes for s in specs.values())
        key = hashlib.sha256(f"{self.resume}\n".encode() + header).hexdigest()
        if self._is_complete(name, key, len(header), size):
            self._bar.write(f"{name}: complete already, checked and kept")
            self._bar.update(size - len(header))
            return
        file = self.folder / name
        with file.open("wb") as f:
            f.write(header)
            sink = _Sink(f)
            try:
                for tensor, spec in specs.items():
                    self._bar.update(_put(sink, tensor, spec, read(tensor)))
            finally:
                digest = sink.close()
            place = header.find(b"0x" + b"0" * 64)
            if place >= 0:
                f.seek(place + 2)
                f.write(digest.encode())
            f.flush()
            os.fsync(f.fileno())
        if self.resume is not None:
            self._journal[name] = {"key": key, "sha256": digest}
            replace_text(self.folder / "journal.json", json.dumps(self._journal))

    def _is_complete(self, name: str, key: str, start: int, size: int) -> bool:
        file, entry = self.folder / name, self._journal.get(name, {})
        if entry.get("key") != key or not file.is_file() or file.stat().st_size != size:
            return False
        digest = hashlib.sha256()
        with file.open("rb") as f:
            f.seek(start)
            while block := f.read(CHUNK):
                digest.update(block)
        return digest.hexdigest() == entry["sha256"]

    def write_text(self, name: str, text: str) -> None:
        """Adds a small file to the set."""
        self._names.append(name)
        replace_text(self.folder / name, text)

    def finish(self) -> list[Path]:
        """Gives every file its final name; returns them."""
        final = [self.target / name for name in self._names]
        for file in final:
            (self.folder / file.name).replace(file)
        self._journal = {}
        return final

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._bar.close()
        if not self._journal:
            shutil.rmtree(self.folder)
        elif error is not None:
            kept = f"{len(self._journal)} complete shards are kept in {self.folder}"
            error.add_note(f"{kept}; the same command goes on from there")
        self._lock.close()


def replace_text(path: Path, text: str) -> None:
    """Writes a small file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _put(sink: "_Sink", name: str, spec: Spec, value: np.ndarray | Iterable[np.ndarray]) -> int:
    """Sends a tensor to a file; returns its bytes."""
    if isinstance(value, np.ndarray):
        value = chunks([value.reshape(spec.shape)], 0, spec.dtype)
    size = 0
    for chunk in value:
        size += chunk.nbytes
        if chunk.dtype != spec.dtype:
            raise ValueError(f"{name}: rows of {chunk.dtype}, announced as {spec.dtype}")
        sink.put(chunk)
    if size != spec.nbytes:
        raise ValueError(f"{name}: {size} bytes, announced as {spec.nbytes} ({spec})")
    return size


class _Sink:
    """Writes, flushes and hashes in threads of their own, while the next chunk is being made.

    The kernel keeps gigabytes before it begins to write them, which the `fsync` at the end would
    wait for; flushed all along, the disk works while the processor does.
    """

    def __init__(self, file: Any):
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        self._queues = [queue.Queue(2), queue.Queue(2), queue.Queue(1)]
        flush, left = self._queues[-1], FLUSH

        def write(data: memoryview) -> None:
            nonlocal left
            file.write(data)
            left -= data.nbytes
            if left <= 0 and not flush.full():
                file.flush()
                flush.put(file.fileno())
                left = FLUSH

        works = (write, self._digest.update, os.fdatasync)
        self._threads = [
            threading.Thread(target=self._run, args=args, daemon=True)
            for args in zip(self._queues, works, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, chunk: np.ndarray) -> None:
        if self._error is not None:
            raise self._error
        data = chunk.reshape(-1).view(np.uint8).data
        for q in self._queues[:2]:
            q.put(data)

    def close(self) -> str:
        """Waits; returns the digest. Raises what went wrong in the threads."""
        for q, thread in zip(self._queues, self._threads, strict=True):
            q.put(None)
            thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _run(self, q: queue.Queue, work: Callable[[Any], Any]) -> None:
        while (data := q.get()) is not None:
            if self._error is None:
                try:
                    work(data)
                except BaseException as e:
                    self._error = e
