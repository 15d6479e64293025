"""The kernels of all networks of a run that learns a stream, at the same probe samples, every few tasks."""

import numpy as np
import torch

from ntkgen.continual.chance import generator_of
from ntkgen.continual.snapshot_layout import SEEN, Layout
from ntkgen.continual.snapshots import Snapshots
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.continual.streaming.record import kernel_folders, require_recorded
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streams.tasks import IntArray
from ntkgen.data.dataset import Dataset
from ntkgen.errors import InputError
from ntkgen.files.folder import Folder
from ntkgen.jacobian.precision import policy


def require_possible_kernels(settings: StreamingSettings, num_classes: int) -> None:
    """Require that the kernels of the settings can be computed, before anything is written.

    Raises:
        InputError: If the output map does not exist or is not one of streams of single samples.
        UnknownNameError: If the output map or the precision has an unknown name.
    """
    if settings.output == SEEN:
        raise InputError(
            "`output` is seen: expected an output map of all classes, such as trace or full, found one of the classes "
            "seen so far, which a stream of single samples does not count. Was it copied from a run on a sequence of "
            "tasks? Use another one."
        )
    Layout.of(settings.output, settings.probe_per_class, num_classes)
    policy(settings.precision)


class StreamKernels:
    """The recorded kernels of every network. A network that has diverged has NaN, and the others go on.

    Args:
        settings: The settings.
        data: The data that are learnt.
        network: The networks, as they are at the beginning.
        folder: The folder of the run.
        device: The device.

    Raises:
        FingerprintError: If there are kernels of other probe samples or settings.
    """

    def __init__(
        self,
        settings: StreamingSettings,
        data: Dataset,
        network: StackedNetwork,
        folder: Folder,
        device: torch.device,
    ) -> None:
        self._every = settings.kernels_every
        self._folder = folder
        self.snapshots: list[Snapshots] = []
        if not self._every:
            return
        ids = _probe_ids(settings, data.labels.numpy())
        probe = data.inputs(torch.from_numpy(ids)).to(device)
        self.snapshots = [
            Snapshots(
                folder / name,
                network.module(member),
                probe,
                labels=data.labels.numpy()[ids],
                sample_ids=ids,
                output=settings.output,
                precision=settings.precision,
                allow_diverged=True,
            )
            for member, name in enumerate(kernel_folders(settings))
        ]

    def record(self, network: StackedNetwork, sample: int, task: int) -> None:
        """Compute the kernels of all networks, after every few tasks. The task −1 is before the first one."""
        if not self.snapshots or (task + 1) % self._every:
            return
        for member, snapshots in enumerate(self.snapshots):
            snapshots(network.module(member), iteration=sample, task=task)

    def require(self, finished_tasks: int) -> None:
        """Require that the kernels of all tasks up to a checkpoint are there.

        Raises:
            StoreError: If some are missing.
        """
        for snapshots in self.snapshots:
            require_recorded(self._folder, snapshots.series, "time", 1 + finished_tasks // self._every)

    def truncate(self, sample: int) -> None:
        """Drop what is later than a sample; −1 drops everything."""
        for snapshots in self.snapshots:
            snapshots.truncate(sample)

    def sync(self) -> None:
        """Complete the metadata of the arrays."""
        for snapshots in self.snapshots:
            snapshots.series.sync()


def _probe_ids(settings: StreamingSettings, labels: IntArray) -> IntArray:
    """Draw some samples of each class, the same ones for all networks."""
    drawn = [
        generator_of(settings.seeds[0], "probe", label).permutation(np.flatnonzero(labels == label))[
            : settings.probe_per_class
        ]
        for label in np.unique(labels).tolist()
    ]
    return np.sort(np.concatenate(drawn))
