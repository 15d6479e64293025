"""`ntkgen analyze`: a stored kernel → an answer. Each question has its own file."""

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

# Names of the commands and of their modules.
QUESTIONS = ("spectrum", "density", "logdet", "extrapolate", "regress", "flow", "align", "compare")


class LazyGroup(click.Group):
    """A group that imports each command on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as in click
        """List the commands, simple questions first."""
        return list(QUESTIONS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as in click
        """Import a command."""
        if cmd_name not in QUESTIONS:
            return None
        command: click.Command = getattr(importlib.import_module(f"ntkgen.cli.analyze.{cmd_name}"), cmd_name)
        return command


@click.group(cls=LazyGroup)
def analyze() -> None:
    """Compute spectra, log-determinants, predictions and comparisons of stored kernels.

    The commands need neither torch nor a GPU, and a kernel may be larger than memory. Results are saved beside each
    store, in STORE.analysis, and are not computed twice.
    """


@dataclass(frozen=True)
class Asked:
    """Values of the options that all questions share."""

    dtype: str | None
    output: int | None
    allow_partial: bool
    memory_bytes: int | None
    as_json: bool
    quiet: bool
    client: "Client | None"

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> "Asked":
        """Remove the shared options from the options of a command, and connect to the cluster if one is given."""
        scheduler, client = options.pop("client"), None
        if scheduler is not None:
            from ntkgen.engine.cluster import connected

            client = click.get_current_context().with_resource(connected(scheduler))
        names = [name for name in cls.__dataclass_fields__ if name != "client"]
        return cls(**{name: options.pop(name) for name in names}, client=client)

    def matrix(self, path: str) -> "Matrix":
        """Open the store at a path for analysis. Warn if its certificate finds the kernel wrong.

        A certificate is a measured bound on the error of a stored kernel.
        """
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
        """Print an answer as one JSON object or as text. Warn if it could not be saved beside the store."""
        self.show_values(answer.store, answer.to_json(), page)
        if answer.not_kept is not None:
            warn(
                f"The result could not be saved beside {answer.store} ({answer.not_kept}). The same command will "
                "compute it again."
            )

    def show_values(self, store: str, values: Mapping[str, Any], page: Sequence[str]) -> None:
        """Print values about a store as one JSON object, or the name of the store and the lines of ``page``."""
        show(json.dumps(values) if self.as_json else "\n".join([store, *page]))


# Options that all questions share.
shared_options = stacked(
    dtype_option(help="Dtype of the stored kernel to analyse [the most precise]."),
    click.option("--of-output", "output", type=int, help="Output to analyse in a kernel of the output map `diagonal`."),
    click.option("--allow-partial", is_flag=True, help="If tiles are missing, use the largest complete leading block."),
    memory_option("Maximum memory of the whole process [80 % of the free memory]."),
    scheduler_option("Run passes over the tiles on a dask cluster: address or file of its scheduler."),
    json_option("store"),
    quiet_option,
)
