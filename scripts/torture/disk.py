"""The files of a run on disk: their phases, and the differences of two folders."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Phases of a run in their order, with patterns for the files that they write. A file without a pattern is of the first.
PHASES = {"creation": "", "diagonal": r"\.zarr/(diagonal|logits)/c/", "tiles": r"\.zarr/(ntk|underflow)_"}
# Files of a tile, in both triangles.
TILE = re.compile(r"\.zarr/(?:ntk|underflow)_\w+/c/(\d+)/(\d+)")

Tile = tuple[int, int]


class Version(NamedTuple):
    """The state of a file at some moment."""

    written: tuple[int, int]  # inode and time, which change if the file is written again
    num_bytes: int
    digest: bytes


Snapshot = Mapping[str, Version]


def names_of(out: Path) -> list[str]:
    """List the names of all files in a folder and its subfolders."""
    found = []
    for folder, _, files in os.walk(out):
        found += [f"{folder[len(str(out)) + 1 :]}/{file}".lstrip("/") for file in files]
    return sorted(found)


def take_snapshot(out: Path) -> Snapshot:
    """Read every file that is not being written at the moment."""
    found = {}
    for name in names_of(out):
        try:
            data, status = (out / name).read_bytes(), (out / name).stat()
        except FileNotFoundError:  # a temporary file that has been renamed, or a lock that has been released
            continue
        if not name.endswith((".partial", ".lock")):
            found[name] = Version((status.st_ino, status.st_mtime_ns), len(data), hashlib.blake2b(data).digest())
    return found


def progress(out: Path) -> Iterator[int]:
    """Count the steps of a run at each call: its files, and the replacements of files.

    A run replaces the checkpoint after each epoch, and the zarr.json of the store when all its files exist.
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
    """Count the files in a folder and its subfolders, without locks."""
    return sum(not name.endswith(".lock") for name in names_of(out))


def phase_of(name: str) -> str:
    """Return the phase in which a run writes a file.

    >>> phase_of("k.zarr/diagonal/zarr.json"), phase_of("k.zarr/diagonal/c/0"), phase_of("k.zarr/ntk_float32/c/0/1")
    ('creation', 'diagonal', 'tiles')
    """
    return next(
        (phase for phase, pattern in PHASES.items() if pattern and re.search(pattern, name)), next(iter(PHASES))
    )


def tiles_of(names: Iterable[str]) -> dict[Tile, set[str]]:
    """Group files by tile.

    >>> sorted(tiles_of(["k.zarr/ntk_float32/c/0/2", "k.zarr/ntk_float32/c/2/0", "k.zarr/logits/c/0/0"])[0, 2])
    ['k.zarr/ntk_float32/c/0/2', 'k.zarr/ntk_float32/c/2/0']
    """
    found: dict[Tile, set[str]] = defaultdict(set)
    for name in names:
        if match := TILE.search(name):
            row, col = sorted(map(int, match.groups()))
            found[row, col].add(name)
    return found


# comparison -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """Differences between two folders."""

    differing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    num_bytes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files that differ, are absent, or are extra."""
        return self.differing + self.absent + self.extra


def compare(expected: Path, found: Path) -> Differences:
    """Compare the names and bytes of all files of two folders, including locks and temporary files."""
    wanted, there = set(names_of(expected)), set(names_of(found))
    both = {name: differing_bytes(expected / name, found / name) for name in sorted(wanted & there)}
    absent, extra = sorted(wanted - there), sorted(there - wanted)
    alone = [expected / name for name in absent] + [found / name for name in extra]
    num_bytes = sum(both.values()) + sum(file.stat().st_size for file in alone)
    return Differences(tuple(name for name, num in both.items() if num), tuple(absent), tuple(extra), num_bytes)


def differing_bytes(first: Path, second: Path) -> int:
    """Count the bytes that differ. Bytes that only one file has count too."""
    x, y = (np.frombuffer(file.read_bytes(), np.uint8) for file in (first, second))
    common = min(len(x), len(y))
    return int(np.count_nonzero(x[:common] != y[:common])) + abs(len(x) - len(y))


@dataclass(frozen=True)
class Fate:
    """Numbers of tiles that changed between two moments."""

    recomputed: int  # tiles with a file that was written again
    whole_recomputed: int  # recomputed tiles that had all their files before
    lost: int  # tiles that had all their files before, and have a missing or changed file now


def follow(expected: Snapshot, before: Snapshot, after: Snapshot) -> Fate:
    """Compare the tiles of a store at two moments. ``expected`` is the finished store."""
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
