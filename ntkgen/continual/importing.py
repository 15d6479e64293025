"""The metrics that the ETH course project `yufei118liu/ntk_continual` has published, as runs of ntkgen.

Its pickles hold ``metrics[MODEL][DATASET][SPLIT][WIDTH]``, where a run is a dictionary of three lists with one item per
task: ``train_ntk_matrices`` and ``test_ntk_matrices``, the kernels of ten training and ten validation samples of the
task, and ``task_accuracies``. Those of task t begin with the first epoch of this task, so they have E (T − t) items for
T tasks of E epochs each. Blocks between tasks, and between training and validation samples, were not recorded: they are
NaN. Iterations, labels, positions of samples, and losses were not recorded either.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import ntkgen
from ntkgen.continual.axes import ATTRIBUTE, FORMAT_VERSION, TIME, kernel_array, row_arrays, time_arrays
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.pickles import read_pickle
from ntkgen.continual.presets import preset_of
from ntkgen.continual.record import CONFIG, EVALUATION, evaluation_arrays, write_config
from ntkgen.continual.series import FixedArray, Series
from ntkgen.errors import InputError
from ntkgen.files.folder import Folder

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MODELS = {"mlp": "mlp", "nn": "mlp", "rnn": "ntk-rnn", "cnn": "cnn"}
# By the name of a data set: its number of classes, its preset, and the method of its runs with replay.
DATASETS = {"cifar10": (10, "eth-cifar10", "replay-mixed"), "cifar100": (100, "eth-cifar100", "replay-two-pass")}
TRAIN, TEST, ACCURACIES = "train_ntk_matrices", "test_ntk_matrices", "task_accuracies"


@dataclass(frozen=True, eq=False)
class ImportedRun:
    """One run of a pickle, checked.

    Attributes:
        settings: The settings that the run was published with.
        num_epochs: Epochs per task, E.
        kernels: Kernels of training and of validation samples: for each part and task, (epochs, samples, samples).
        accuracies: For each task, (epochs,).
        iterations_per_epoch: Iterations of an epoch.
    """

    settings: RunSettings
    num_epochs: int
    kernels: tuple[list[FloatArray], list[FloatArray]]
    accuracies: list[FloatArray]
    iterations_per_epoch: int = 1

    @property
    def num_tasks(self) -> int:
        """Number of tasks, T."""
        return len(self.accuracies)

    @property
    def name(self) -> str:
        """Name of the folder, such as ``cifar10-mlp-finetune/width100/seed0``: all widths can be opened together."""
        settings = self.settings
        return f"{settings.dataset}-{settings.model}-{settings.method}/width{settings.width}/seed0"

    def evaluation(self, epoch: int) -> dict[str, Any]:
        """Values of the arrays of evaluations after some epochs in all."""
        accuracy = np.full(self.num_tasks, np.nan)
        for task in range(self.trained_task(epoch) + 1):
            accuracy[task] = self.accuracies[task][epoch - 1 - task * self.num_epochs]
        unknown = np.full(self.num_tasks, np.nan)
        measures = {"accuracy": accuracy, "head_accuracy": accuracy, "task_accuracy": unknown, "loss": unknown}
        return measures | self._when(epoch) | {"trained_task": self.trained_task(epoch)}

    def snapshot(self, epoch: int) -> dict[str, Any]:
        """Values of the arrays of kernels after some epochs in all."""
        tasks, parts = self.rows
        kernel = np.full((len(tasks), len(tasks)), np.nan, np.float32)
        for task in range(self.trained_task(epoch) + 1):
            for part, matrices in enumerate(self.kernels):
                rows = np.flatnonzero((tasks == task) & (parts == part))
                kernel[np.ix_(rows, rows)] = matrices[task][epoch - 1 - task * self.num_epochs]
        what = {"step_size": self.settings.step_size, "num_outputs": DATASETS[self.settings.dataset][0]}
        return {"kernel": kernel, "task": self.trained_task(epoch), **what, **self._when(epoch)}

    @property
    def rows(self) -> tuple[IntArray, IntArray]:
        """Task of each probe sample, and its part: 0 for training and 1 for validation samples."""
        counts = [(task, part, self.kernels[part][task].shape[1]) for task in range(self.num_tasks) for part in (0, 1)]
        tasks, parts = (np.repeat([each[i] for each in counts], [each[2] for each in counts]) for i in (0, 1))
        return tasks.astype(np.int64), parts.astype(np.int64)

    def trained_task(self, epoch: int) -> int:
        """The task that was trained in an epoch, counted from 1 over all tasks."""
        return (epoch - 1) // self.num_epochs

    def _when(self, epoch: int) -> dict[str, Any]:
        return {"iteration": epoch * self.iterations_per_epoch, "epoch": float(epoch)}


def read_published(file: Path, method: str | None = None, iterations_per_epoch: int = 1) -> list[ImportedRun]:
    """Read the runs of a published pickle, without running anything in it.

    Args:
        file: The pickle.
        method: The method of its runs; None for finetune, or for replay if the name of the file says so.
        iterations_per_epoch: Iterations of an epoch, which the file does not say.

    Raises:
        InputError: If it is not there, or holds something else.
    """
    if not file.is_file():
        found = "a folder" if file.is_dir() else "nothing"
        raise InputError(
            f"There is no file {file}: expected a pickle of published metrics, found {found}. Is the path misspelt, or "
            "that of the folder with the file? Give the path of the file."
        )
    with file.open("rb") as opened:
        found = read_pickle(opened, str(file))
    check, runs = _Check(str(file)), []
    for model, by_dataset in check.dictionary(found, "metrics"):
        for dataset, by_split in check.dictionary(by_dataset, model):
            for split, by_width in check.dictionary(by_split, f"{model}, {dataset}"):
                for width, run in check.dictionary(by_width, f"{model}, {dataset}, {split}"):
                    where = f"{model}, {dataset}, {split}, {width}"
                    checked = check.run(run, where)
                    settings = _settings(check, (model, dataset, width), checked, method or _method(file))
                    runs.append(ImportedRun(settings, settings.epochs, *checked, iterations_per_epoch))
    if not runs:
        check.refuse("a run", "none")
    if repeated := [name for name, count in Counter(run.name for run in runs).items() if count > 1]:
        check.refuse("one run of each network, data set and width", f"several that would be {repeated[0]}")
    return runs


def require_empty(folders: Iterable[Folder]) -> None:
    """Require that there is no run at any of some places.

    Raises:
        InputError: If there is one.
    """
    for folder in folders:
        if folder.has(CONFIG):
            raise InputError(
                f"There is a run at {folder}: expected an empty place, because nothing is overwritten. Was the file "
                "imported before? Remove the folder, or choose another `out`."
            )
        folder.require_writable()


def write_run(run: ImportedRun, folder: Folder, source: Path) -> None:
    """Write an imported run as `ntkgen.open_run` reads it. Its settings are written last: then it is complete.

    Raises:
        InputError: If there is a run already.
    """
    require_empty([folder])
    for name in ("run.zarr", "kernels.zarr"):
        (folder / name).clear()  # an import that was interrupted
    times = range(1, run.num_tasks * run.num_epochs + 1)
    tasks, parts = run.rows
    unknown = np.full(len(tasks), -1)
    order = np.arange(DATASETS[run.settings.dataset][0])
    fixed = [
        FixedArray("class_order", order, ("target",), {"long_name": "label of each target"}),
        FixedArray("probe_task", tasks, ("probe",), {"long_name": "task of the probe sample"}),
        FixedArray("probe_is_validation", parts > 0, ("probe",), {"long_name": "whether it is a validation sample"}),
    ]
    attributes = {"ntkgen_run": {"format_version": 1, "finished_tasks": run.num_tasks}}
    with Series.create(folder / "run.zarr", evaluation_arrays(run.num_tasks), fixed, attributes) as series:
        for epoch in times:
            series.append(EVALUATION, run.evaluation(epoch))
    notes = {"sample": np.arange(len(tasks)), "output": np.zeros(len(tasks)), "task": tasks}
    rows = row_arrays({name: notes.get(name, unknown) for name in ("sample", "output", "label", "task", "sample_id")})
    arrays = [kernel_array("kernel", "float32", (len(tasks), len(tasks)), ("row", "col")), *time_arrays()]
    identity = {"format_version": FORMAT_VERSION, "output": "sum", "precision": "float32", "layers": []}
    identity |= {"num_outputs": DATASETS[run.settings.dataset][0], "version": ntkgen.__version__}
    with Series.create(folder / "kernels.zarr", arrays, rows, {ATTRIBUTE: identity}) as series:
        for epoch in times:
            series.append(TIME, run.snapshot(epoch))
    facts = {"imported": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    write_config(folder, run.settings, facts)


def _method(file: Path) -> str:
    return "replay" if "replay" in file.name else "finetune"


def _settings(
    check: "_Check", names: tuple[str, str, str], checked: tuple[Any, list[FloatArray]], method: str
) -> RunSettings:
    """The settings of a run: its preset with its quirks. The key of the split is not used; some files have it wrong."""
    model, dataset, width = names[0].lower(), re.sub(r"\W|_", "", names[1].lower()), names[2]
    if dataset not in DATASETS:
        check.refuse(f"a data set of {', '.join(DATASETS)}", names[1])
    if model not in MODELS:
        check.refuse(f"a model of {', '.join(MODELS)}", names[0])
    if not width.isdecimal() or not int(width):
        check.refuse("a positive width", width)
    num_classes, preset, replay = DATASETS[dataset]
    num_tasks = len(checked[1])
    if num_classes % num_tasks:
        check.refuse(f"tasks of equally many of the {num_classes} classes", f"{num_tasks} tasks")
    size = num_classes // num_tasks
    given = {
        "model": MODELS[model],
        "width": int(width),
        "method": replay if method == "replay" else method,
        "split": f"{size}/{size}",
        "epochs": len(checked[1][-1]),
    }
    return RunSettings.from_json(preset_of(preset).values(given, compatible=True))


@dataclass(frozen=True)
class _Check:
    """Checks what a pickle holds, and says where it is something else."""

    file: str

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Say what is wrong.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{self.file} does not hold the published metrics: expected {expected}, found {found}. Is it a file of "
            "another project? Import one of those of yufei118liu/ntk_continual."
        )

    def dictionary(self, value: Any, where: str) -> list[tuple[str, Any]]:
        """List the items of a dictionary that are used; unused keys hold None."""
        if not isinstance(value, Mapping):
            self.refuse(f"a dictionary at {where}", type(value).__name__)
        return [(str(key), each) for key, each in value.items() if each is not None]

    def run(self, value: Any, where: str) -> tuple[tuple[list[FloatArray], list[FloatArray]], list[FloatArray]]:
        """Read the kernels and accuracies of a run."""
        if not isinstance(value, Mapping) or any(not isinstance(value.get(name), list) for name in _LISTS):
            self.refuse(f"the lists {', '.join(_LISTS)} at {where}", str(list(value))[:80])
        accuracies = [self.numbers(each, 1, f"{where}, {ACCURACIES}") for each in value[ACCURACIES]]
        if any((each < 0).any() or (each > 1).any() for each in accuracies):
            self.refuse(f"fractions from 0 to 1 at {where}, {ACCURACIES}", "numbers outside")
        num_tasks = len(accuracies)
        num_epochs = len(accuracies[-1]) if accuracies else 0
        expected = [num_epochs * (num_tasks - task) for task in range(num_tasks)]
        parts = []
        for name in (TRAIN, TEST):
            matrices = [self.numbers(each, 3, f"{where}, {name}") for each in value[name]]
            if any(each.shape[1] != each.shape[2] for each in matrices):
                self.refuse(f"square matrices at {where}, {name}", "others")
            parts.append(matrices)
        for name, found in zip(_LISTS, (*parts, accuracies), strict=True):
            lengths = [len(each) for each in found]
            if not num_epochs or lengths != expected:
                self.refuse(f"E (T − t) values of task t at {where}, {name}", f"{lengths} of {num_tasks} tasks")
        return (parts[0], parts[1]), accuracies

    def numbers(self, value: Any, ndim: int, where: str) -> FloatArray:
        """Read numbers of some number of axes."""
        try:
            found = np.array(value, np.float64)
        except (ValueError, TypeError):
            found = np.array(np.nan)
        if found.ndim != ndim or not np.isfinite(found).all():
            self.refuse(f"finite numbers of {ndim} axes at {where}", "others")
        return found


_LISTS = (TRAIN, TEST, ACCURACIES)
