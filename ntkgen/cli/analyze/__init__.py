"""`ntkgen analyze`: from a stored kernel to an answer; one file per question."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.messages import show, warn
from ntkgen.cli.options import dtype_option, json_option, memory_option, quiet_option, scheduler_option, stacked

if TYPE_CHECKING:
    from distributed import Client

    from ntkgen.analysis.answer import Answer
    from ntkgen.analysis.matrix import Matrix

# The commands, each in the module of its name.
QUESTIONS = ("spectrum", "density", "logdet", "extrapolate", "regress", "flow", "align", "compare")


class LazyGroup(click.Group):
    """A group whose commands are loaded when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as in click
        """Name the commands in the order of what they build on."""
        return list(QUESTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as in click
        """Load a command."""
        if cmd_name not in QUESTIONS:
            return None
        command: click.Command = getattr(importlib.import_module(f"ntkgen.cli.analyze.{cmd_name}"), cmd_name)
        return command


@click.group(cls=LazyGroup)
def analyze() -> None:
    """Ask stored kernels for their spectrum, their log-determinant, what they predict, and how they differ.

    Needs no torch and no GPU, and memory for a part of the kernel alone. Results are kept beside each store, in
    STORE.analysis, and not computed twice.
    """


@dataclass(frozen=True)
class Asked:
    """What every question is asked with."""

    dtype: str | None
    output: int | None
    allow_partial: bool
    memory_bytes: int | None
    as_json: bool
    quiet: bool
    client: "Client | None"

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> "Asked":
        """Take these options out of a command's, and connect to the cluster until the command ends."""
        scheduler, client = options.pop("client"), None
        if scheduler is not None:
            from ntkgen.engine.cluster import connected

            client = click.get_current_context().with_resource(connected(scheduler))
        names = [name for name in cls.__dataclass_fields__ if name != "client"]
        return cls(**{name: options.pop(name) for name in names}, client=client)

    def matrix(self, path: str) -> "Matrix":
        """Open the store at a path for analysis; say it once if its kernel is wrong."""
        from ntkgen.analysis.matrix import open_matrix
        from ntkgen.store.describe import inaccuracy
        from ntkgen.store.opening import open_store

        store = open_store(path)
        if (wrong := inaccuracy(store)) is not None:
            warn(wrong)
        return open_matrix(
            store,
            dtype=self.dtype,
            output=self.output,
            allow_partial=self.allow_partial,
            client=self.client,
        )

    def show(self, answer: "Answer", page: Sequence[str]) -> None:
        """Print an answer: one JSON object, or lines for people; and say so where it could not be kept."""
        self.show_values(answer.store, answer.to_json(), page)
        if answer.not_kept is not None:
            warn(
                f"The result is not kept beside {answer.store}, and is computed again when it is asked for "
                f"({answer.not_kept})."
            )

    def show_values(self, store: str, values: Mapping[str, Any], page: Sequence[str]) -> None:
        """Print what is said of a store: one JSON object, or lines for people."""
        show(json.dumps(values) if self.as_json else "\n".join([store, *page]))


# What every question has.
shared_options = stacked(
    dtype_option(help="Which of the stored kernels [the most precise]."),
    click.option("--of-output", "output", type=int, help="Which matrix, of a kernel of the output `diagonal`."),
    click.option("--allow-partial", is_flag=True, help="Take the largest complete leading part, if tiles are missing."),
    memory_option("Memory that this process may take in all [80 % of what is free]."),
    scheduler_option("Divide passes over the tiles among the workers of a running dask cluster."),
    json_option("store"),
    quiet_option,
)
