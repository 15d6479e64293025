"""`ntkgen compute`: the name of a network → a kernel on disk."""

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.certificate import certificate_summary
from ntkgen.cli.messages import complain, note, show, warn
from ntkgen.cli.options import (
    POSITIVE,
    SEED,
    Command,
    ManyOption,
    aligned,
    dry_run_option,
    dtype_option,
    memory_option,
    scheduler_option,
    tile_option,
    training_options,
)
from ntkgen.cli.session import Settings, start_process
from ntkgen.errors import InputError
from ntkgen.plan.spec import KernelSpec
from ntkgen.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ntkgen.engine.computation import Execution
    from ntkgen.pipeline import FinishedKernel, PlannedKernel

# Value of --per-layer without patterns. It is no pattern, because no name of a parameter has a space.
ONE_PER_MODULE = "one per module"

# Line of the summary of a store with layers.
LAYERS_HINT = "    kernel.by_layer             # one kernel per layer, lazily; their sum is the kernel\n"


@click.command(cls=Command)
@training_options
@click.option("--subsample", type=int, help="Number of samples: the first ones of the data set [all].")
@click.option(
    "--against", type=click.Choice(["test"]), help="Take the samples of the test split as columns [those of the rows]."
)
@click.option(
    "--against-subsample", type=int, help="Number of samples of the columns: the first ones of the split [all]."
)
@click.option("--select", help="Outputs of the network, such as logits, 'logits[:, -1, [5, 7]]' or '0[:, :3]' [all].")
@click.option(
    "--params",
    cls=ManyOption,
    metavar="PATTERN...",
    help="Parameters by patterns of their names, such as 'head.*' or '!*embed*' [all trainable ones].",
)
@click.option(
    "--per-layer",
    cls=ManyOption,
    alone=ONE_PER_MODULE,
    metavar="[[NAME=]PATTERN...]",
    help="Also store the kernel of each group of parameters, by patterns [one group per module, if none is given].",
)
@click.option(
    "--output",
    default=KernelSpec.output,
    show_default=True,
    metavar="MAP",
    help="Output map: full, sum, centered, index:K, trace or diagonal. See `ntkgen manual computing`.",
)
@click.option("--shuffle-seed", type=SEED, help="Seed of a random order of the samples [order of the data set].")
@click.option(
    "--precision",
    default=KernelSpec.precision,
    show_default=True,
    help="Precision of the computation: float64, float64-accumulate, float32, tf32, bfloat16.",
)
@dtype_option(
    "dtypes",
    cls=ManyOption,
    default=KernelSpec.dtypes,
    metavar="DTYPE...",
    help=f"Dtypes of the stored kernel: float16, float32, float64 [{' '.join(KernelSpec.dtypes)}].",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "upper", "full"]),
    default=KernelSpec.layout,
    show_default=True,
    help="Store one triangle (upper) or both (full). auto stores both up to 10 GB.",
)
@tile_option
@memory_option("Maximum additional memory of the computation, such as 8GB [see `ntkgen manual computing`].")
@click.option("--replan", is_flag=True, help="Continue on another kind of machine. Its tiles differ in the last bits.")
@click.option(
    "--certify/--no-certify",
    default=KernelSpec.certify,
    show_default=True,
    help="Measure the error of the finished kernel, and store a bound on it (the certificate).",
)
@click.option("--workers", type=click.IntRange(min=1), help="Number of worker processes on this machine [none].")
@scheduler_option("Compute on the workers of a running dask cluster: address or file of its scheduler.")
@click.option("--part", metavar="k/K", help="Compute part k of K. The last job finishes the kernel.")
@click.option(
    "--tile-timeout",
    "tile_seconds",
    type=POSITIVE,
    help="Maximum time of a worker for one tile in seconds [estimated from finished tiles].",
)
@dry_run_option
@click.option("--explain", "explained", is_flag=True, help="Like --dry-run, with the cost of each layer.")
def compute(*, dry_run: bool, explained: bool, **options: Any) -> int:
    """Compute the kernels of networks.

    A network without a checkpoint is trained first. After an interruption, the same command continues from the last
    epoch or tile. The exit code is 1 if a network did not converge, or if the measured error of a finished kernel is
    too large.

    \b
    ntkgen compute --models lenet --dataset digits --subsample 500
    ntkgen compute --models resnet18 vgg11 --dataset cifar --subsample 5000
    ntkgen compute --models mylab.nets:wide --dataset mine.npz --epochs 0
    ntkgen compute --models mylab.lm:tiny --dataset prompts.npz --select 'logits[:, -1]' --params '*lora_*'
    ntkgen compute --models lenet --dataset digits --subsample 500 --per-layer
    """  # noqa: D301 - \b tells click not to wrap the lines
    start_process()
    from ntkgen import pipeline
    from ntkgen.cli.progress import progress_bars
    from ntkgen.jacobian.adapter import Target
    from ntkgen.jacobian.groups import as_groups
    from ntkgen.projection import duration_of, project, takes_minutes
    from ntkgen.store.describe import loses_precision
    from ntkgen.store.rounding import check_dtypes

    settings = Settings.pop_from(options)
    samples = {name: options.pop(name) for name in ("subsample", "shuffle_seed", "against", "against_subsample")}
    execution_options = {name: options.pop(name) for name in ("workers", "client", "part", "tile_seconds")}
    target = Target.of(None, options.pop("select"), options.pop("params") or None)
    groups = as_groups(_groups(options["per_layer"]))
    spec = KernelSpec(**{**options, "dtypes": check_dtypes(options["dtypes"]), "per_layer": groups})
    kernel = pipeline.KernelRequest(**samples, spec=spec, target=target)
    with _execution(settings, **execution_options) as execution:
        setup, data = settings.setup(execution), settings.load_data(any_form=True)
        against = None if kernel.against is None else settings.load_data(kernel.against)
        missing_bytes = 0
        for request in settings.requests():  # wrong input is reported before any computation
            planned = pipeline.plan_kernel(request, kernel, setup, data, against)
            missing_bytes += planned.missing_bytes
            if settings.verbose:
                click.echo(_layer_lines(planned), err=True)
            if dry_run or explained:
                projection = project(planned, explained=explained)
                show(json.dumps(projection) if settings.as_json else _projection(projection))
        pipeline.require_disk(setup, missing_bytes)
        if loses_precision(spec.precision, spec.dtypes):
            warn(_precision_warning(spec.precision, spec.dtypes))
        if dry_run or explained:
            return 0
        exit_code = 0
        for request in settings.requests():
            planned = pipeline.plan_kernel(request, kernel, setup, data, against)
            projected = duration_of(planned).total if takes_minutes(planned) else None
            with progress_bars(request.model, quiet=settings.quiet) as report:
                result = pipeline.run_kernel(planned, report)
            values = result.to_json() | {"projected_seconds": projected}
            show(json.dumps(values) if settings.as_json else _summary(result, projected))
            if (wrong := result.described.inaccuracy) is not None:
                complain(wrong)
                exit_code = 1
    return exit_code


def _groups(values: "Sequence[str]") -> dict[str, list[str]] | bool:
    """Read patterns of groups of parameters. A pattern without a name is its own name.

    >>> _groups(["mlp=*mlp*", "head.*", "mlp=!*bias"]), _groups([ONE_PER_MODULE]), _groups([])
    ({'mlp': ['*mlp*', '!*bias'], 'head.*': ['head.*']}, True, False)
    """
    if tuple(values) == (ONE_PER_MODULE,):
        return True
    groups: dict[str, list[str]] = {}
    for value in values:
        name, equals, pattern = value.partition("=")
        groups.setdefault(name, []).append(pattern if equals else value)
    return groups or False


@contextmanager
def _execution(
    settings: Settings, *, workers: int | None, client: str | None, part: str | None, tile_seconds: float | None
) -> "Iterator[Execution]":
    """Choose how the tiles are computed: in this process, by workers, or only a part of them in this process.

    Raises:
        InputError: If the options ask for both a part and workers.
    """
    from ntkgen.engine.computation import Execution
    from ntkgen.engine.coordinator import open_pool
    from ntkgen.plan.tiles import Part

    if part is not None and (workers is not None or client is not None):
        raise InputError(
            f"--part {part} cannot be combined with workers: expected one of the two, found both. A part is one of "
            "several independent jobs, and workers share all tiles. Leave out --part, or --workers and --scheduler."
        )
    chosen = None if part is None else Part.parse(part)
    with open_pool(workers, client, settings.device, tile_seconds) as pool:
        if pool is not None and not settings.quiet:
            note(f"{pool.num_workers} workers. Their dask dashboard is at {pool.dashboard}")
        yield Execution(pool, chosen)


def _precision_warning(precision: str, dtypes: tuple[str, ...]) -> str:
    floor = "1e-7" if "float32" in dtypes else "5e-4"
    return (
        f"The kernel is computed in {precision} but stored only as {' and '.join(dtypes)}. Storing adds an error of "
        f"about {floor} of the largest eigenvalue, and smaller eigenvalues are lost. To keep them, add --dtype float64."
    )


def _layer_lines(planned: "PlannedKernel") -> str:
    """Describe the treatment of each layer's parameters."""
    plan = planned.plan.jacobian
    lines = [f"{planned.training.model}: blocks of {planned.plan.block_samples} samples, batches of {plan.batch_size}"]
    lines += [
        f"  {layer.shape.name or '(the network itself)'}: {layer.order}, {layer.shape.num_params:,} parameters, "
        f"{layer.shape.positions} positions{', Jacobian rows kept' if layer.keeps_rows else ''}"
        for layer in plan.layers
    ]
    lines += [f"  {plan.dense_params:,} parameters as dense Jacobian rows (biases, normalisations, autograd)"]
    together = min(plan.fallback_samples, len(planned.inputs.all))
    is_single = plan.fallback_way == "one by one" or together == 1
    way = "one sample after the other" if is_single else f"{together} samples at once"
    lines += [f"  {name}: no rule, computed by autograd, {way}" for name in plan.fallback]
    return "\n".join(lines)


def _projection(values: dict[str, Any]) -> str:
    size = _size(values["rows"], values["cols"], values["output"])
    lines = {
        "store": values["store"],
        "kernel": f"{size}, {' and '.join(values['dtypes'])}, layout {values['layout']}",
        "tiles": f"{values['tiles_missing']:,} of {values['tiles']:,} to compute, {values['tile_side']:,} rows each",
        "disk": human_bytes(values["disk_bytes"]),
        "memory": f"{human_bytes(values['projected_bytes'])} at most, in addition to the loaded program",
        "work": f"{values['projected_flops']:.3g} FLOP, factors of {values['factor_samples']:,} samples",
        "time": _time(values["seconds"]),
    }
    samples = _samples(values["num_samples"], values["num_col_samples"], values["num_outputs"])
    title = f"{values['model']} on {values['dataset']}: {samples}"
    explained = _explained(values["parts"]) if "parts" in values else []
    page = [f"{title}, {values['num_params']:,} parameters", *aligned(lines), *explained, "  Nothing was written."]
    return "\n".join(page)


def _time(seconds: dict[str, Any]) -> str:
    """Write the projected duration of a run on this machine, in total and for each kind of work."""
    if not seconds["total"]:
        return "nothing is missing"
    low, high = seconds["range"]
    names = ("training", "factors", "products", "storing", "certificate")
    parts = ", ".join(
        f"{name} {'at most ' if name == 'training' else ''}{human_seconds(seconds[name])}"
        for name in names
        if seconds[name]
    )
    return f"{human_seconds(low)} to {human_seconds(high)} on this machine ({parts})"


def _samples(num_samples: int, num_col_samples: int | None, num_outputs: int) -> str:
    """Write the numbers of samples and of outputs of a kernel."""
    against = "" if num_col_samples is None else f" against {num_col_samples:,}"
    outputs = "" if num_outputs == 1 else f" × {num_outputs} outputs"
    return f"{num_samples:,} samples{against}{outputs}"


def _size(rows: int, cols: int, output: str) -> str:
    """Write the size of a kernel, and its output map unless it is ``full``."""
    of = "" if output == "full" else f", output {output}"
    return f"{rows:,} × {cols:,}{of}"


def _explained(parts: list[dict[str, Any]]) -> list[str]:
    """Write the parts of a plan as a table, with the total in the last line."""
    total, explicit = (sum(part[key] for part in parts) for key in ("flops", "explicit_flops"))
    width = max(len(part["name"]) for part in parts)
    lines = [
        "",
        f"  {'part':<{width}}  {'T, k → c':<22}  {'order':<20}  {'kept/sample':>11}  {'FLOP':>9}  {'explicit':>9}",
    ]
    for part in parts:
        kept = human_bytes(part["factor_bytes"]) if part["factor_bytes"] else ""
        lines.append(
            f"  {part['name']:<{width}}  {part['shape']:<22}  {part['order']:<20}  {kept:>11}  {part['flops']:>9.3g}  "
            f"{part['explicit_flops']:>9.3g}"
        )
    saved = f"{explicit / total:.1f} times fewer than with Jacobian rows only" if total else "nothing is missing"
    return [*lines, f"  {'total':<{width}}  {saved:<59}  {total:>9.3g}  {explicit:>9.3g}", ""]


def _summary(result: "FinishedKernel", projected: float | None) -> str:
    found = result.described
    network = f"{found.provenance.model} on {found.provenance.dataset}"
    samples = _samples(found.num_samples, found.num_col_samples, found.num_outputs)
    if not found.is_complete:
        return (
            f"\n{network}: part {result.part} of the kernel of {samples} is done.\n"
            f"  {found.store}\n  {found.tiles_missing:,} of {found.tiles:,} tiles are missing. The last of the other "
            "parts finishes the kernel. The same command without --part does this too.\n"
        )
    trained = "without training" if result.train_accuracy is None else f"trained to {result.train_accuracy:.2f} %"
    # The projection counts all epochs of a training, which may end earlier.
    expected = "" if projected is None else f" (projected: {human_seconds(projected)})"
    view = "kernel(output=0)" if found.output == "diagonal" else "array"
    return (
        f"\n{network}, {trained}: the kernel of {samples} is complete"
        f"{'' if found.inaccuracy is None else ', and WRONG'}.\n"
        f"  {found.store}\n"
        f"  {' and '.join(found.arrays)}, {_size(found.rows, found.cols, found.output)}, layout {found.layout}, "
        f"{human_bytes(found.stored_bytes)}, {result.seconds:.1f} s{expected}\n"
        f"  accuracy: {certificate_summary(found)}\n"
        f"  network: {found.num_params:,} parameters in {result.checkpoint}\n\n"
        "  Open it in Python:\n"
        "    import ntkgen\n"
        f"    kernel = ntkgen.open({found.store!r})\n"
        f"    kernel.{view}[:10, :10]      # NumPy; lazily: kernel.dask, kernel.xarray\n"
        f"{LAYERS_HINT if found.layers else ''}"
    )
