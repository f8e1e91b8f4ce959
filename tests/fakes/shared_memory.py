"""Named shared memory as torch lays it out: a file in /dev/shm with a count, a 64-byte header and then the bytes.

Both ends, without torch: ``SharedFile`` is an exporter's buffer, ``release`` is what an importer does when it is done.
The count is the int32 at byte 0. Torch changes it atomically; tests have one party at a time. A folder of this process
stands for the /dev/shm of all other hosts: who looks in the real one does not see what lies there.
"""

import contextlib
import itertools
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

DIRECTORY = Path("/dev/shm")
ANOTHER_HOST = DIRECTORY / f"another-host-of-{os.getpid()}"
HEADER_BYTES = 64
_numbers = itertools.count()


class SharedFile:
    """An exporter's buffer, with one count for the exporter and one for each importer to come."""

    def __init__(self, content: bytes, importers: int = 1, *, on_another_host: bool = False) -> None:
        self.name = f"/torch_{os.getpid()}_fake_{next(_numbers)}"
        self.manager_path = "/dev/null"
        """Stands for torch_shm_manager's socket: something that exists."""
        self.size_bytes = len(content)
        header = struct.pack("i", 1 + importers).ljust(HEADER_BYTES, b"\0")
        if on_another_host:
            ANOTHER_HOST.mkdir(exist_ok=True)
        path = (ANOTHER_HOST if on_another_host else DIRECTORY) / self.name.lstrip("/")
        path.write_bytes(header + content)

    @property
    def count(self) -> int:
        """1 once every importer has let go; 0 if the file is gone."""
        path = path_of(self.name)
        return int(struct.unpack("i", path.read_bytes()[:4])[0]) if path.exists() else 0

    def add_importers(self, number: int = 1) -> None:
        """As ``_shared_incref`` before each further send."""
        _change_count(path_of(self.name), number)

    def close(self) -> None:
        """Remove the file, whoever still counts."""
        path_of(self.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # never made, or not the last
            ANOTHER_HOST.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def files_of_this_process() -> set[str]:
    """Names of what torch, or a fake of it, has in /dev/shm for this process: the exporter's part, or a leak."""
    return {path.name for path in DIRECTORY.glob(f"torch_{os.getpid()}_*")}


def path_of(name: str) -> Path:
    """The file behind a name such as "/torch_1_2", on whatever host it is."""
    elsewhere = ANOTHER_HOST / name.lstrip("/")
    return elsewhere if elsewhere.exists() else DIRECTORY / name.lstrip("/")


def read(name: str, start: int, end: int) -> bytes:
    """Bytes of the buffer."""
    with path_of(name).open("rb") as file:
        file.seek(HEADER_BYTES + start)
        return file.read(end - start)


def release(name: str) -> None:
    """An importer is done; the last one out removes the file."""
    if _change_count(path_of(name), -1) <= 0:
        path_of(name).unlink()


def _change_count(path: Path, by: int) -> int:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), HEADER_BYTES) as header:
        count = int(struct.unpack_from("i", header)[0]) + by
        struct.pack_into("i", header, 0, count)
    return count
