"""`ntkgen train`: training of networks until they converge."""

import json
import time
from typing import Any

import click

from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, training_options
from ntkgen.cli.session import Settings, start_process


@click.command(cls=Command)
@training_options
def train(**options: Any) -> None:
    """Train networks until their training accuracy reaches the target.

    A checkpoint is written after every epoch. The same command continues an interrupted training.
    """
    start_process()
    from ntkgen import pipeline
    from ntkgen.cli.progress import progress_bars

    settings = Settings.pop_from(options)
    setup, data = settings.setup(), settings.load_data()
    setup.out.require_writable()
    for request in settings.requests():
        pipeline.plan_training(request, data, setup)
    for request in settings.requests():
        started = time.monotonic()
        planned = pipeline.plan_training(request, data, setup)
        with progress_bars(request.model, quiet=settings.quiet) as report:
            checkpoint, path = pipeline.run_training(request, data, setup, planned, report)
        result = {
            "checkpoint": str(path),
            "model": request.model,
            "dataset": data.name,
            "seed": request.seed,
            "epochs": checkpoint.epoch,
            "train_accuracy": checkpoint.train_accuracy,
            "train_loss": checkpoint.train_loss,
            "num_params": sum(param.numel() for param in planned[0].parameters()),
            "seconds": round(time.monotonic() - started, 3),
        }
        show(json.dumps(result) if settings.as_json else _summary(result))


def _summary(result: dict[str, Any]) -> str:
    accuracy = result["train_accuracy"]
    reached = "without training" if accuracy is None else f"training accuracy {accuracy:.2f} %"
    return (
        f"{result['model']} on {result['dataset']}, seed {result['seed']}: {reached} after {result['epochs']} epochs, "
        f"{result['seconds']:.1f} s\n  {result['checkpoint']}"
    )
