"""`ntkgen models` and `ntkgen datasets`: lists of the known networks and data sets."""

import dataclasses
import json

import click

from ntkgen.cli.options import Command, json_option
from ntkgen.units import human_bytes


@click.command(cls=Command)
@json_option("network")
def models(*, as_json: bool) -> None:
    """List the built-in networks: name, number of parameters, paper."""
    from ntkgen.training.zoo import listing

    for row in listing():
        text = (
            f"{row['model']:<13}{row['num_params']:>12,}  {row['paper']}{'  [--width]' if row['takes_width'] else ''}"
        )
        click.echo(json.dumps(row) if as_json else text)


@click.command(cls=Command)
@json_option("data set")
def datasets(*, as_json: bool) -> None:
    """List the data sets: name, training samples, classes, image shape, size of the whole kernel in float16."""
    from ntkgen.data.catalog import ALIASES, DATASETS

    for name, entry in DATASETS.items():
        aliases = [alias for alias, target in ALIASES.items() if target == name]
        if as_json:
            click.echo(json.dumps({**dataclasses.asdict(entry), "aliases": aliases}))
            continue
        shape = "×".join(map(str, entry.image_shape))
        title = f"{entry.title} (also {', '.join(aliases)})" if aliases else entry.title
        size = human_bytes((entry.num_samples * entry.num_classes) ** 2 * 2)
        facts = f"{entry.num_samples:>8,} samples {entry.num_classes:>4} classes  {shape:<8} {size:>9}"
        click.echo(f"{name:<10}{facts}  {title}")
    if not as_json:
        click.echo("FILE.npz  your own data set: x (samples, channels, height, width) and y (samples,)")
