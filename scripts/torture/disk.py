"""What a run has left on disk: which files, in which phase they are written, and how two folders differ."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What a run writes, one after the other; what no pattern matches is the first.
PHASES = {"creation": "", "diagonal": r"\.zarr/(diagonal|logits)/c/", "tiles": r"\.zarr/(ntk|underflow)_"}
# Files of one tile, on both sides of the diagonal.
TILE = re.compile(r"\.zarr/(?:ntk|underflow)_\w+/c/(\d+)/(\d+)")

Tile = tuple[int, int]


class Version(NamedTuple):
    """A file as it was at some moment."""

    written: tuple[int, int]  # inode and time, which are others when it is written again
    num_bytes: int
    digest: bytes


Snapshot = Mapping[str, Version]


def names_of(out: Path) -> list[str]:
    """Name all files below a folder."""
    found = []
    for folder, _, files in os.walk(out):
        found += [f"{folder[len(str(out)) + 1 :]}/{file}".lstrip("/") for file in files]
    return sorted(found)


def take_snapshot(out: Path) -> Snapshot:
    """Read every file that is not being written."""
    found = {}
    for name in names_of(out):
        try:
            data, status = (out / name).read_bytes(), (out / name).stat()
        except FileNotFoundError:  # a draft that was renamed meanwhile, or a lock that was let go
            continue
        if not name.endswith((".partial", ".lock")):
            found[name] = Version((status.st_ino, status.st_mtime_ns), len(data), hashlib.blake2b(data).digest())
    return found


def progress(out: Path) -> Iterator[int]:
    """Count, whenever asked, the files that are there or being written, and how often those of a folder were replaced.

    Replaced are the checkpoint, epoch by epoch, and the store's zarr.json when all files are there.
    """
    versions: dict[Path, set[tuple[int, int]]] = defaultdict(set)
    while True:
        for file in (*out.glob("*.pt"), *out.glob("*.zarr/zarr.json")):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            versions[file].add((status.st_ino, status.st_mtime_ns))
        yield num_files(out) + sum(len(seen) - 1 for seen in versions.values())


def num_files(out: Path) -> int:
    """Count the files below a folder, but for locks."""
    return sum(not name.endswith(".lock") for name in names_of(out))


def phase_of(name: str) -> str:
    """Say when a run writes a file.

    >>> phase_of("k.zarr/diagonal/zarr.json"), phase_of("k.zarr/diagonal/c/0"), phase_of("k.zarr/ntk_float32/c/0/1")
    ('creation', 'diagonal', 'tiles')
    """
    return next(
        (phase for phase, pattern in PHASES.items() if pattern and re.search(pattern, name)), next(iter(PHASES))
    )


def tiles_of(names: Iterable[str]) -> dict[Tile, set[str]]:
    """Gather the files of each tile.

    >>> sorted(tiles_of(["k.zarr/ntk_float32/c/0/2", "k.zarr/ntk_float32/c/2/0", "k.zarr/logits/c/0/0"])[0, 2])
    ['k.zarr/ntk_float32/c/0/2', 'k.zarr/ntk_float32/c/2/0']
    """
    found: dict[Tile, set[str]] = defaultdict(set)
    for name in names:
        if match := TILE.search(name):
            row, col = sorted(map(int, match.groups()))
            found[row, col].add(name)
    return found


# what is compared -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """How one folder differs from another."""

    differing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    num_bytes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Name all files that are not as they should be."""
        return self.differing + self.absent + self.extra


def compare(expected: Path, found: Path) -> Differences:
    """Compare names and bytes of all files of two folders, locks and drafts included."""
    wanted, there = set(names_of(expected)), set(names_of(found))
    both = {name: differing_bytes(expected / name, found / name) for name in sorted(wanted & there)}
    absent, extra = sorted(wanted - there), sorted(there - wanted)
    alone = [expected / name for name in absent] + [found / name for name in extra]
    num_bytes = sum(both.values()) + sum(file.stat().st_size for file in alone)
    return Differences(tuple(name for name, num in both.items() if num), tuple(absent), tuple(extra), num_bytes)


def differing_bytes(first: Path, second: Path) -> int:
    """Count the bytes that differ; those that only one file has do."""
    x, y = (np.frombuffer(file.read_bytes(), np.uint8) for file in (first, second))
    common = min(len(x), len(y))
    return int(np.count_nonzero(x[:common] != y[:common])) + abs(len(x) - len(y))


@dataclass(frozen=True)
class Fate:
    """What became of the tiles between two moments."""

    recomputed: int  # had a file that was written again
    whole_recomputed: int  # of these, had every file
    lost: int  # had every file, and one of them has gone or has other bytes


def follow(expected: Snapshot, before: Snapshot, after: Snapshot) -> Fate:
    """Follow the tiles of a finished store from one moment to a later one."""
    tiles = tiles_of(expected)
    again = {tile for tile, names in tiles.items() if any(_is_rewritten(name, before, after) for name in names)}
    whole = {tile for tile, names in tiles.items() if all(_is_whole(name, before, expected) for name in names)}
    lost = {tile for tile in whole if any(_is_lost(name, before, after) for name in tiles[tile])}
    return Fate(len(again), len(again & whole), len(lost))


def _is_rewritten(name: str, before: Snapshot, after: Snapshot) -> bool:
    return name in before and name in after and before[name].written != after[name].written


def _is_whole(name: str, found: Snapshot, expected: Snapshot) -> bool:
    return name in found and found[name].num_bytes == expected[name].num_bytes


def _is_lost(name: str, before: Snapshot, after: Snapshot) -> bool:
    return name not in after or after[name][1:] != before[name][1:]
