"""A record of finished work that survives a crash: whole lines of JSON, appended and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from ciuic_hf.errors import CiuicError


class Journal:
    """What a piece of work is and which parts of it are finished; held by one process at a time.

    Attributes:
        identity: what the work is, None when it has not begun.
        done: names of finished parts.

    Raises:
        CiuicError: when another process holds it, or the file is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b")
        self._lock()
        self.identity: dict[str, Any] | None = None
        self.done: set[str] = set()
        self._read()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CiuicError(
                f"Another process is at work in {self._path.parent}; let it finish or stop it first."
            ) from None

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # the last one, cut off by a crash
            try:
                entry = json.loads(line)
                if self.identity is None:
                    self.identity = dict(entry["identity"])
                else:
                    self.done.update(entry["done"])
            except (ValueError, KeyError, TypeError):
                raise CiuicError(
                    f"{self._path} is damaged; delete {self._path.parent} and begin anew."
                ) from None
            whole += len(line)
        self._file.truncate(whole)

    def forget(self) -> None:
        """Begin with an empty record."""
        self._file.truncate(0)
        self.identity, self.done = None, set()

    def begin(self, identity: dict[str, Any]) -> None:
        """Record what the work is."""
        self.forget()
        self.identity = identity
        self._append({"identity": identity})

    def add(self, names: Iterable[str]) -> None:
        """Record parts as finished; what they consist of must be on disk already."""
        names = sorted(names)
        if names:
            self.done.update(names)
            self._append({"done": names})

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
