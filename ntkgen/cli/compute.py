"""`ntkgen compute`: from a model's name to a kernel on disk."""

import json
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.options import SEED, Bytes, ManyCommand, ManyOption, aligned, training_options
from ntkgen.cli.session import Settings, start_process
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.pipeline import Job


@click.command(cls=ManyCommand)
@training_options
@click.option("--subsample", type=int, help="Samples of the kernel, the first ones [all].")
@click.option("--shuffle-seed", type=SEED, help="Take the samples in a recorded random order.")
@click.option("--precision", default="float32", show_default=True, help="How it is computed: float32 or float64.")
@click.option(
    "--dtype",
    "dtypes",
    cls=ManyOption,
    default=("float16", "float32"),
    metavar="DTYPE...",
    help="How it is stored: float16, float32, float64 [float16 float32].",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "upper", "full"]),
    default="auto",
    show_default=True,
    help="One triangle or both; auto stores both up to 10 GB.",
)
@click.option("--tile", "tile_side", type=int, help="Rows of a tile, a multiple of the outputs [from n and m].")
@click.option(
    "--memory", "memory_bytes", type=Bytes(), help="Memory that the computation may add, as 8GB [80 % of free]."
)
@click.option(
    "--replan", is_flag=True, help="Continue on another kind of machine, with tiles that differ in last bits."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and leave nothing behind.")
def compute(*, dry_run: bool, **options: Any) -> None:
    """Train networks where there is no checkpoint, and compute their kernels.

    An interrupted run goes on with the same command, from the last epoch or tile.

    \b
    ntkgen compute --models lenet --dataset digits --subsample 500
    ntkgen compute --models resnet18 vgg11 --dataset cifar --subsample 5000
    ntkgen compute --models mylab.nets:wide --dataset mine.npz --epochs 0
    """  # noqa: D301 - \b is click's sign for lines that must not be wrapped
    start_process()
    from ntkgen import pipeline
    from ntkgen.cli.progress import progress_bars
    from ntkgen.kernel.rounding import check_dtypes

    settings = Settings.pop_from(options)
    kernel = pipeline.KernelRequest(**{**options, "dtypes": check_dtypes(options["dtypes"])})
    place, data = settings.place(), settings.load_data()
    missing_bytes = 0
    for request in settings.requests():  # everything that can be wrong is found before anything runs
        job = pipeline.plan_job(request, kernel, place, data)
        missing_bytes += job.missing_bytes
        if settings.verbose:
            click.echo(_treatment(job), err=True)
        if dry_run:
            projection = pipeline.project(job)
            click.echo(json.dumps(projection) if settings.as_json else _projection(projection))
    pipeline.require_disk(place, missing_bytes)
    if dry_run:
        return
    for request in settings.requests():
        job = pipeline.plan_job(request, kernel, place, data)
        with progress_bars(request.model, quiet=settings.quiet) as report:
            result = pipeline.run_job(job, report)
        click.echo(json.dumps(result) if settings.as_json else _summary(result))


def _treatment(job: "Job") -> str:
    """Say how each layer's parameters are treated."""
    plan = job.plan.jacobian
    lines = [f"{job.training.model}: block of {job.plan.block_samples} samples, batches of {plan.batch_size}"]
    lines += [
        f"  {layer.shape.name or '(the network itself)'}: {layer.order}, {layer.shape.num_params:,} parameters, "
        f"{layer.shape.positions} positions{', rows kept' if layer.keeps_rows else ''}"
        for layer in plan.layers
    ]
    lines += [f"  {plan.dense_params:,} parameters as plain rows (biases, normalisations, fallbacks)"]
    lines += [f"  {name}: no rule, through torch.func" for name in plan.fallback]
    return "\n".join(lines)


def _projection(values: dict[str, Any]) -> str:
    rows, outputs = f"{values['rows']:,}", values["num_outputs"]
    lines = {
        "store": values["store"],
        "kernel": f"{rows} × {rows}, {' and '.join(values['dtypes'])}, layout {values['layout']}",
        "tiles": f"{values['tiles_missing']:,} of {values['tiles']:,} to compute, {values['tile_side']:,} rows each",
        "disk": human_bytes(values["disk_bytes"]),
        "memory": f"{human_bytes(values['projected_bytes'])} at most beside the loaded program",
        "work": f"{values['projected_flops']:.3g} FLOP, {values['factor_samples']:,} factor computations",
    }
    title = f"{values['model']} on {values['dataset']}: {values['num_samples']:,} samples × {outputs} outputs"
    page = [f"{title}, {values['num_params']:,} parameters", *aligned(lines), "  Nothing was written."]
    return "\n".join(page)


def _summary(result: dict[str, Any]) -> str:
    accuracy = result["train_accuracy"]
    trained = "taken as built" if accuracy is None else f"trained to {accuracy:.2f} %"
    rows = f"{result['rows']:,}"
    return (
        f"\n{result['model']} on {result['dataset']}, {trained}: the kernel of {result['num_samples']:,} samples × "
        f"{result['num_outputs']} outputs is complete.\n"
        f"  {result['store']}\n"
        f"  {' and '.join(result['arrays'])}, {rows} × {rows}, layout {result['layout']}, "
        f"{human_bytes(result['stored_bytes'])}, {result['seconds']:.1f} s\n"
        f"  network: {result['num_params']:,} parameters in {result['checkpoint']}\n\n"
        "  Open it in Python:\n"
        "    import ntkgen\n"
        f"    kernel = ntkgen.open({result['store']!r})\n"
        "    kernel.array[:10, :10]      # NumPy; lazily: kernel.dask, kernel.xarray\n"
    )
