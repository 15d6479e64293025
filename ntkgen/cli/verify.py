"""`ntkgen verify`: checksums, recomputed tiles, repair, and certificates (measured error bounds) of stored kernels."""

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.certificate import certificate_lines
from ntkgen.cli.messages import complain, note, show
from ntkgen.cli.options import (
    Command,
    aligned,
    data_dir_option,
    device_option,
    json_option,
    memory_option,
    quiet_option,
    seed_option,
)
from ntkgen.cli.session import start_process
from ntkgen.errors import InputError, NtkgenError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ntkgen.checks.sampling import Sampling
    from ntkgen.checks.verify import Damage
    from ntkgen.engine.recompute import Recomputed
    from ntkgen.progress import Report
    from ntkgen.store.describe import StoreDescription
    from ntkgen.store.store import KernelStore

# Exit codes for a store that is damaged, incomplete or wrong, and for a store that cannot be verified.
DAMAGED, UNREACHED = 1, 2
# Maximum number of damaged files that are printed per store. --json lists all.
SHOWN = 20


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--repair", "repaired", is_flag=True, help="Remove damaged files, so that they can be computed again.")
@click.option(
    "--recompute",
    "num_tiles",
    type=click.IntRange(min=0),
    help="Number of random tiles to compute again [1 if that takes at most about a minute, otherwise 0].",
)
@click.option(
    "--certify", "certified", is_flag=True, help="Measure the error of the kernel again and store a bound on it."
)
@data_dir_option
@device_option("Device of the computation, as for compute.")
@memory_option("Maximum additional memory for computing tiles again [80 % of the free memory].")
@click.option(
    "--probes",
    "num_probes",
    type=int,
    help="Number of random vectors of a certificate [10; 3 for the output maps trace and diagonal; none if comparing "
    "every entry does not cost more].",
)
@click.option(
    "--pairs",
    "num_pairs",
    type=int,
    help="Number of pairs of samples of a certificate [16; fewer for the trace of many outputs; all if comparing every "
    "entry does not cost more].",
)
@seed_option("Seed of the random tiles, vectors and pairs.")
@json_option("store")
@quiet_option
def verify(
    paths: tuple[str, ...], *, num_probes: int | None, num_pairs: int | None, as_json: bool, **options: Any
) -> int:
    """Verify the kernel stores at PATH...: check the size and the checksum of every file.

    The command also computes one random tile again. For this it needs the data set and the checkpoint beside the store.
    The tile must have the same bytes, or on another kind of machine the same numbers up to rounding. This step is
    skipped if the checkpoint or the data are missing, or if it would take long. With --recompute N it is always tried,
    and an error is reported if it is impossible. PATH may be a URL such as s3://bucket/x.zarr.

    With --repair, damaged files are removed. The same `ntkgen compute` then computes them again. With --certify, the
    kernel is compared with the exact kernel. A bound on its error, the certificate, is written into the store.

    Exit codes: 0 if every store is whole, or if --repair has removed all damaged files. 1 if something is damaged,
    missing, not computed yet or wrong. 2 if a path holds no store, or if a requested step is impossible.
    """
    start_process()
    from ntkgen.checks.sampling import Sampling, usual_sampling

    def sampling_of(output: str, num_logits: int) -> Sampling:
        usual = usual_sampling(output, num_logits)
        given = {"num_probes": num_probes, "num_pairs": num_pairs, "seed": options["seed"]}
        chosen = {name: value for name, value in given.items() if value is not None}
        is_random = num_probes is not None or num_pairs is not None
        return dataclasses.replace(usual, **chosen, or_whole=not is_random)

    sampling_of("full", 1)  # refuses impossible numbers before any file is read
    request, exit_code = _Request(sampling_of, **options), 0
    for path in paths:
        finding = _verify_path(path, request)
        if as_json or "error" not in finding.result:
            show(json.dumps(finding.result) if as_json else _page(finding.result, finding.described))
        for line in finding.notes:
            note(line)
        for problem, code in finding.problems:
            complain(problem)
            exit_code = max(exit_code, code)
    return exit_code


@dataclass(frozen=True)
class _Request:
    """Steps beside the checksums, and their settings."""

    sampling_of: "Callable[[str, int], Sampling]"
    repaired: bool
    num_tiles: int | None
    certified: bool
    data_dir: Path | None
    device: str
    memory_bytes: int | None
    seed: int
    quiet: bool


@dataclass
class _Finding:
    """Printed result of one store.

    Attributes:
        result: Values of the JSON object.
        described: Description of a whole store; None for a damaged or incomplete one.
        notes: Lines that are not errors.
        problems: Errors with their exit codes.
    """

    result: dict[str, Any]
    described: "StoreDescription | None" = None
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[str, int]] = field(default_factory=list)


def _verify_path(path: str, request: _Request) -> _Finding:
    """Verify one store. Return an error as a finding, so that the other stores are verified too."""
    from ntkgen.cli.progress import progress_bars
    from ntkgen.files.bucket import first_lines, is_remote_error

    try:
        with progress_bars(path.rstrip("/").rpartition("/")[2], quiet=request.quiet) as report:
            return _verify_store(path, request, report)
    except NtkgenError as error:
        problem = (str(error), error.exit_code)
    except Exception as error:
        if not is_remote_error(error):
            raise
        problem = (
            f"{path} cannot be verified: {first_lines(error)}. Is the path right, and do you have access to it?",
            UNREACHED,
        )
    return _Finding({"store": path, "is_whole": None, "error": problem[0]}, problems=[problem])


def _verify_store(path: str, request: _Request, report: "Report") -> _Finding:
    """Verify one store with the requested steps: checksums, recomputed tiles, repair, certificate."""
    from ntkgen.checks.verify import find_damage, repair

    finding = _Finding({"store": path})
    with _open_for_request(path, request) as store:
        damage = find_damage(store, report)
        damage += _differing_files(store, damage, request, report, finding)
        is_whole = not damage and store.manifest.is_complete
        finding.result |= {"is_whole": is_whole, "damage": [each.to_json() for each in damage]}
        finding.result["removed"] = repair(store, damage) if request.repaired else []
        if not is_whole:
            _report_problems(store, damage, request, finding)
    if is_whole:
        _report_whole(store, request, report, finding)
    return finding


def _report_problems(store: "KernelStore", damage: "Sequence[Damage]", request: _Request, finding: _Finding) -> None:
    from ntkgen.checks.verify import explain_damage, explain_unfinished, next_step, unfinished_tiles

    unfinished = unfinished_tiles(store, damage)
    finding.result |= {
        "tiles": store.grid.num_tiles,
        "tiles_missing": len(unfinished),
        "next": next_step(store, damage),
    }
    if not request.repaired:
        problem = explain_damage(store, damage) if damage else explain_unfinished(store, unfinished)
        finding.problems.append((problem, DAMAGED))


def _report_whole(store: "KernelStore", request: _Request, report: "Report", finding: _Finding) -> None:
    """Add the description of a whole store to the finding. With --certify, certify the store first."""
    from ntkgen.store.describe import describe
    from ntkgen.store.opening import open_store

    if request.certified:
        _certify_store(store, request, report, finding)
        store = open_store(store.folder)
    described = finding.described = describe(store)
    finding.problems += [(wrong, DAMAGED)] if (wrong := described.inaccuracy) else []
    kept = (
        "rows", "cols", "num_col_samples", "num_logits", "output", "arrays", "certificate", "inaccuracy",
        "suspicious_tiles",
    )  # fmt: skip
    values = described.to_json()
    finding.result |= {name: values[name] for name in (*kept, "tiles", "tiles_missing")} | {"next": None}


@contextmanager
def _open_for_request(path: str, request: _Request) -> "Iterator[KernelStore]":
    """Open a store. A repair opens it under its write lock, and only if no process writes tiles."""
    from ntkgen.files.lock import require_no_tile_writers, write_lock
    from ntkgen.store.opening import open_store

    store = open_store(path)
    if not request.repaired:
        yield store
        return
    with write_lock(store.folder):
        require_no_tile_writers(store.folder)
        yield open_store(store.folder, mode="r+")


def _differing_files(
    store: "KernelStore", damage: "Sequence[Damage]", request: _Request, report: "Report", finding: _Finding
) -> "list[Damage]":
    """Compute tiles again and return the files that differ.

    If that is impossible, it is a problem with --recompute, and otherwise only a note.
    """
    from ntkgen.checks.verify import Damage

    finding.result |= {"recomputed": [], "not_recomputed": None}
    try:
        again = _recompute_tiles(store, damage, request, report)
    except (InputError, StoreError) as error:
        finding.result["not_recomputed"] = str(error)
        if request.num_tiles is None:
            finding.notes.append(f"No tile of {store.name} was computed again. {error}")
        else:
            finding.problems.append((str(error), error.exit_code))
        return []
    finding.result["recomputed"] = [each.to_json() for each in again]
    return [Damage(file, "different", each.tile) for each in again for file in each.different]


def _recompute_tiles(
    store: "KernelStore", damage: "Sequence[Damage]", request: _Request, report: "Report"
) -> "list[Recomputed]":
    from ntkgen import origin
    from ntkgen.checks.verify import whole_tiles
    from ntkgen.engine.machine import choose_device

    if request.num_tiles == 0:
        return []
    _require_small_arrays(store, damage)
    download = request.num_tiles is not None or request.certified  # the default step downloads no data set
    device, memory = choose_device(request.device), request.memory_bytes
    settings = origin.RecomputeSettings(request.num_tiles, request.seed, device, memory, request.data_dir, download)
    return origin.recompute_tiles(store, whole_tiles(store, damage), settings, report)


def _require_small_arrays(store: "KernelStore", damage: "Sequence[Damage]") -> None:
    """Require that all files other than tiles are whole, since they define the samples and sizes of the tiles.

    Raises:
        StoreError: If such a file is damaged.
    """
    from ntkgen.store.describe import first_few
    from ntkgen.store.remedy import Remedy

    if files := [each.file for each in damage if each.tile is None]:
        command = Remedy.of(store.name, store.manifest).command
        raise StoreError(
            f"Tiles of {store.name} cannot be compared: expected its diagonal, coordinates and metadata to be whole, "
            f"found files damaged or missing ({first_few(files)}). Was a copy interrupted, or is there a disk error? "
            f"Repair the store with --repair and the same `{command}`, then verify it again."
        )


def _certify_store(store: "KernelStore", request: _Request, report: "Report", finding: _Finding) -> None:
    from ntkgen import origin
    from ntkgen.engine.machine import choose_device

    num_logits = store.manifest.plan.profile.num_logits
    sampling = request.sampling_of(store.manifest.output, num_logits)
    try:
        origin.certify_again(store.folder, request.data_dir, sampling, choose_device(request.device), report)
    except NtkgenError as error:
        finding.problems.append((str(error), error.exit_code))


def _page(result: dict[str, Any], described: "StoreDescription | None") -> str:
    """Write the findings about a store as text."""
    again = _recomputed_line(result["recomputed"])
    if described is not None:
        whole = f"every file of {', '.join(described.arrays)} is whole, {described.rows:,} × {described.cols:,}"
        return "\n".join([result["store"], *aligned({"checksums": whole, **again, **certificate_lines(described)})])
    damage = [_damage_line(each) for each in result["damage"]]
    more = {"": f"… and {len(damage) - SHOWN:,} more files; --json lists all"} if len(damage) > SHOWN else {}
    return "\n".join(
        [result["store"], *damage[:SHOWN], *aligned({**more, **_missing(result), **again, **_repair_lines(result)})]
    )


def _damage_line(damage: dict[str, Any]) -> str:
    tile = "" if damage["tile"] is None else "  tile ({}, {})".format(*damage["tile"])
    return f"  {damage['problem']:<12}{damage['file']:<28}{tile}".rstrip()


def _missing(result: dict[str, Any]) -> dict[str, str]:
    missing = result["tiles_missing"]
    return {"unfinished": f"{missing:,} of {result['tiles']:,} tiles are not computed yet"} if missing else {}


def _repair_lines(result: dict[str, Any]) -> dict[str, str]:
    count = len(result["removed"])
    removed = {"removed": f"{count:,} damaged {'file' if count == 1 else 'files'}"} if count else {}
    return {**removed, "next": result["next"]}


def _recomputed_line(recomputed: list[dict[str, Any]]) -> dict[str, str]:
    """Write the recomputed tiles and the results of their comparison in one line."""
    from ntkgen.store.describe import first_few

    if not recomputed:
        return {}
    tiles = list(dict.fromkeys("({}, {})".format(*each["tile"]) for each in recomputed))
    verdicts = dict.fromkeys(_verdict(each) for each in recomputed)
    return {"recomputed": f"{'tile' if len(tiles) == 1 else 'tiles'} {first_few(tiles)}: {', '.join(verdicts)}"}


def _verdict(each: dict[str, Any]) -> str:
    if each["equal"]:
        return f"{each['dtype']} has equal bits"
    allowed = f"{each['tolerance']:.1e} allowed" if each["tolerance"] else "none allowed on this machine"
    return f"{each['dtype']} has an error of {each['max_error']:.1e} of the diagonal, {allowed}"
