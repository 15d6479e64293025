"""`ntkgen verify`: every file of a store read, and on request a new certificate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.certificate import certificate_lines
from ntkgen.cli.options import SEED, aligned
from ntkgen.cli.session import start_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from ntkgen.kernel.certificate import Sampling

DAMAGED = 1  # the exit code where a store is not whole, or not what it should be


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--certify", "certified", is_flag=True, help="Compare the kernel with the exact one again.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the data sets [NTKGEN_DATA_DIR or data].")
@click.option("--device", default="auto", show_default=True, help="Where the exact kernel is computed, as for compute.")
@click.option("--probes", type=int, help="Random vectors of a certificate [10; 3 for the outputs trace and diagonal].")
@click.option("--pairs", default=16, show_default=True, type=int, help="Pairs of samples of a certificate.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of both.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per store on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
def verify(paths: tuple[Path, ...], *, probes: int | None, pairs: int, seed: int, as_json: bool, **options: Any) -> int:
    """Read every file of the kernel stores at PATH... and compare it with its checksum.

    With --certify the kernel is also compared with the exact one, computed from the checkpoint beside the store and
    its data set, and the certificate is written into the store. Exit code 1: something is damaged, missing or wrong.
    """
    start_process()
    from ntkgen.kernel.certificate import Sampling, usual_sampling

    def sampling_of(output: str) -> Sampling:
        return Sampling(usual_sampling(output).num_probes if probes is None else probes, pairs, seed)

    sampling_of("full")  # numbers that cannot be meant are refused before anything is read
    exit_code = 0
    for path in paths:
        result, problem = _verified(path, sampling_of, **options)
        click.echo(json.dumps(result) if as_json else _page(result))
        if problem is not None:
            click.echo(f"Error: {problem}", err=True)
            exit_code = DAMAGED
    return exit_code


def _verified(
    path: Path,
    sampling_of: "Callable[[str], Sampling]",
    *,
    certified: bool,
    data_dir: Path | None,
    device: str,
    quiet: bool,
) -> tuple[dict[str, Any], str | None]:
    """Read one store, and certify it where it is whole; return what was found, and what is wrong."""
    from ntkgen.cli.progress import progress_bars
    from ntkgen.kernel.report import describe, suspicion
    from ntkgen.kernel.store import open_store
    from ntkgen.kernel.verify import explain_damage, find_damage

    store = open_store(path)
    with progress_bars(path.name, quiet=quiet) as report:
        damage = find_damage(store, lambda done, total: report("files", done, total))
        if certified and not damage:
            from ntkgen import origin
            from ntkgen.kernel.engine import choose_device

            sampling = sampling_of(store.manifest.identity.get("output", "full"))
            origin.certify_again(path, data_dir, sampling, choose_device(device), report)
            store = open_store(path)
    files = [{"file": each.file, "problem": each.problem} for each in damage]
    result = {"store": str(path), "is_whole": not damage, "damage": files}
    if damage:
        return result, explain_damage(store, damage)
    described = describe(store)
    kept = ("rows", "cols", "num_col_samples", "output", "arrays", "certificate", "suspicious_tiles")
    return result | {name: described[name] for name in kept}, suspicion(store) if certified else None


def _page(result: dict[str, Any]) -> str:
    if not result["is_whole"]:
        return "\n".join([result["store"], *(f"  {each['problem']:<12}{each['file']}" for each in result["damage"])])
    whole = f"every file of {', '.join(result['arrays'])} is whole, {result['rows']:,} × {result['cols']:,}"
    return "\n".join([result["store"], *aligned({"checksums": whole, **certificate_lines(result)})])
