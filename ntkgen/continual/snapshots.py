"""Kernels of fixed probe samples during training: `ntkgen.Snapshots`, for any training loop."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import ntkgen
from ntkgen.continual.axes import ATTRIBUTE, FORMAT_VERSION, TIME
from ntkgen.continual.linearization import MEASURES, LazyError
from ntkgen.continual.series import Series
from ntkgen.continual.snapshot_layout import SEEN, Layout, Notes
from ntkgen.errors import DivergedError, FingerprintError, InputError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of
from ntkgen.fingerprints import array_fingerprint
from ntkgen.jacobian.attributes import attributes_of
from ntkgen.jacobian.batches import ArrayLike, checked_batches
from ntkgen.jacobian.kernel_function import KernelFunction
from ntkgen.jacobian.precision import policy

if TYPE_CHECKING:
    import os

    from zarr.abc.store import Store


class Snapshots:
    """Records the kernel of fixed samples, the probe samples, during training.

    A call computes the kernel for the current parameters, appends it to a Zarr group and returns it. The network, its
    mode, its gradients, its buffers and all random states are not changed. The trained parameters therefore have the
    same bits as without snapshots. If the process is killed, the group still has the kernels of all finished calls. An
    existing group of the same probe samples and settings is continued.

    The group has the arrays ``kernel`` (time, row, col) and ``logits`` (time, sample, output), the outputs of the
    network on the probe samples. For each time it has ``iteration``, ``epoch``, ``task``,
    ``step_size`` and ``num_outputs``. For each row it has ``row_sample``, ``row_output``, ``row_label``, ``row_task``
    and ``row_sample_id``, and the same for each column. `xarray.open_zarr` opens the group.

    Args:
        place: A path, a URL or a Zarr store.
        model: The network, as it is at the beginning.
        probe: The probe samples, (n, …).
        labels: The labels of the probe samples.
        tasks: The task of each probe sample.
        sample_ids: The positions of the probe samples in their data set.
        output: The output map, as for `ntkgen.ntk`. ``seen`` means all outputs, with NaN for classes not seen yet.
        precision: The precision of the computation. Kernels are stored as float64 if this precision sums in
            float64, and as float32 otherwise.
        per_layer: Whether to store also one kernel per module. The array is ``kernel_by_layer`` (time, layer, row,
            col), and its sum over the layers is the kernel.
        num_outputs: The final number of outputs, if the last layer gets more outputs during training. None means the
            present number. Entries of outputs that do not exist yet are NaN. ``trace`` and ``sum`` add the outputs
            that exist; such kernels of different numbers of outputs cannot be compared.
        lazy_error: Whether to record also how far the outputs move from those of the linearised network; see
            `LazyError`. The arrays are ``lazy_error``, ``lazy_error_from_start`` and ``buffer_drift`` (time). If the
            training is resumed in another process, restore the last parameters with `load_state_dict`.
        allow_diverged: Whether a network that has diverged has a kernel and outputs of NaN; otherwise it is an error.
        fsync: Whether every file is forced to the disk. If not, a loss of power may damage the last kernels.

    Raises:
        FingerprintError: If the group exists and has other probe samples or other settings.
        InputError: If the probe samples, labels, tasks or positions are invalid.
        ModelError: If the kernel of this network is not defined.
    """

    def __init__(  # noqa: PLR0913 - each is a property of the probe that users name
        self,
        place: "str | os.PathLike[str] | Store | Folder",
        model: nn.Module,
        probe: ArrayLike,
        *,
        labels: ArrayLike | None = None,
        tasks: Sequence[int] | npt.NDArray[np.int64] | None = None,
        sample_ids: Sequence[int] | npt.NDArray[np.int64] | None = None,
        output: str = "trace",
        precision: str = "float32",
        per_layer: bool = False,
        num_outputs: int | None = None,
        lazy_error: bool = False,
        allow_diverged: bool = False,
        fsync: bool = False,
    ) -> None:
        self._probe = checked_batches(probe)[0].clone()  # the caller may change its own later
        self._output, self._precision, self._per_layer = output, precision, per_layer
        self._function = self._prepared(model)
        self._signature = _signature(model)
        self._allow_diverged = allow_diverged
        self._lazy_error = LazyError(model, self._probe, policy(precision).compute_dtype) if lazy_error else None
        notes = Notes.of(len(self._probe), labels, tasks, sample_ids)
        layout = Layout.of(output, len(self._probe), num_outputs or self._function.num_logits)
        self._layout = layout
        self.series = self._opened(folder_of(place, fsync=fsync), layout, notes)

    def __len__(self) -> int:
        """Number of recorded times."""
        return self.series.length(TIME)

    @property
    def last_iteration(self) -> int | None:
        """The iteration of the last recorded kernel; None if there is none."""
        return int(self.series.read("iteration", len(self) - 1)) if len(self) else None

    def __call__(
        self,
        model: nn.Module,
        *,
        iteration: int,
        epoch: float = float("nan"),
        task: int = -1,
        step_size: float = float("nan"),
        num_seen: int | None = None,
    ) -> Tensor:  # (rows, cols), as the array `kernel` of one time
        """Compute the kernel for the current parameters, and append it.

        Args:
            model: The network.
            iteration: Number of iterations of training so far, larger than at the last call.
            epoch: Number of epochs so far.
            task: The task that is being trained.
            step_size: The learning rate.
            num_seen: Number of classes seen so far, for the output ``seen``.

        Raises:
            InputError: If the iteration is not later than the last one.
            ShapeError: If the network has more than ``num_outputs`` outputs.
            DivergedError: If outputs of the network are not finite, without ``allow_diverged``.
        """
        last = self.last_iteration
        if last is not None and iteration <= last:
            raise InputError(
                f"Iteration {iteration} cannot be appended to {self.series.folder}: expected one after {last}, "
                "which is the last recorded one. Is it a run that was begun anew? Record it in another place, or "
                "drop the later times with `truncate`."
            )
        if (signature := _signature(model)) != self._signature:  # a head has grown, or another one is in use
            self._function, self._signature = self._prepared(model), signature
        shown, logits = self._computed(model, num_seen)
        kernel = shown[0] if len(shown) == 1 else torch.stack(shown).sum(0)
        values: dict[str, Any] = {
            "kernel": kernel.cpu().numpy(),
            "logits": self._layout.placed_logits(logits).cpu().numpy(),
            "iteration": iteration,
            "epoch": epoch,
            "task": task,
            "step_size": step_size,
            "num_outputs": self._function.num_logits,
        }
        if self._per_layer:
            values["kernel_by_layer"] = torch.stack(shown).cpu().numpy()
        values |= dict.fromkeys(MEASURES, float("nan"))
        if self._lazy_error is not None:
            values |= self._lazy_error.measure(model, logits, is_first=not len(self))
        # a group that was begun in another way has fewer arrays
        self.series.append(TIME, {name: values[name] for name in self.series.names(TIME)})
        return kernel

    def _computed(self, model: nn.Module, num_seen: int | None) -> tuple[list[Tensor], Tensor]:
        """Compute the kernel, or one per layer, and the outputs; all of them NaN for a network that has diverged.

        Raises:
            DivergedError: If outputs of the network are not finite, and this is not allowed.
        """
        try:
            found = self._function(model)
        except DivergedError:
            if not self._allow_diverged:
                raise
            found = {}
        logits = self._function.logits
        kernels = list(found.values()) if isinstance(found, dict) else [found]
        if self._allow_diverged and not (kernels and all(kernel.isfinite().all() for kernel in kernels)):
            missing = logits.new_full(self._layout.shape, float("nan"))
            return [missing] * max(1, len(self._function.layers)), torch.full_like(logits, float("nan"))
        return [self._layout.placed(kernel, self._function.num_logits, num_seen) for kernel in kernels], logits

    def truncate(self, iteration: int) -> None:
        """Remove the kernels after an iteration, for a run that is resumed from an earlier checkpoint."""
        kept = sum(int(self.series.read("iteration", time)) <= iteration for time in range(len(self)))
        self.series.truncate(TIME, kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next call depends on beside the group, for a checkpoint of the training."""
        return {} if self._lazy_error is None else self._lazy_error.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        if self._lazy_error is not None and state:
            self._lazy_error.load_state_dict(state)

    def __enter__(self) -> Self:
        """Return the snapshots, whose metadata are completed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.series.sync()

    def _prepared(self, model: nn.Module) -> KernelFunction:
        output = "full" if self._output == SEEN else self._output
        return KernelFunction(model, self._probe, output=output, precision=self._precision, per_layer=self._per_layer)

    def _opened(self, folder: Folder, layout: Layout, notes: Notes) -> Series:
        """Continue the series that is there, or begin one.

        Raises:
            FingerprintError: If it is of something else.
        """
        layers = self._function.layers
        identity: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "output": self._output,
            "precision": self._precision,
            "num_outputs": layout.num_outputs,
            "layers": layers,
            "probe": array_fingerprint(self._probe),
            "notes": notes.fingerprint(),
        }
        if not folder.has("zarr.json"):
            attributes = {ATTRIBUTE: {**identity, "version": ntkgen.__version__}}
            growing = layout.growing(self._precision, layers, MEASURES if self._lazy_error else {})
            return Series.create(folder, growing, notes.rows(layout), attributes)
        series = Series.open(folder)
        theirs = series.attributes.get(ATTRIBUTE, {})
        if differing := [name for name, value in identity.items() if theirs.get(name) != value]:
            raise FingerprintError(
                f"The snapshots at {folder} are of something else: {differing[0]} differs, expected "
                f"{str(theirs.get(differing[0]))[:40]}, found {str(identity[differing[0]])[:40]}. Kernels of two "
                "probes or networks would be mixed. Use another place, or the original settings."
            )
        return series


def _signature(model: nn.Module) -> tuple[Any, ...]:
    """Say what a prepared kernel function depends on beside values: shapes, what is trained, and attributes."""
    params = ((name, value.shape, value.requires_grad) for name, value in model.named_parameters())
    return (*params, *((name, value.shape) for name, value in model.named_buffers()), attributes_of(model))
