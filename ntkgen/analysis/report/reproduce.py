"""Commands that reproduce a kernel, and its citation. Both use only the information in its store."""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import ntkgen
from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer
from ntkgen.analysis.gradient_flow import FlowAnswer
from ntkgen.analysis.regression import RegressAnswer
from ntkgen.analysis.results import Kept
from ntkgen.store.manifest import Manifest
from ntkgen.store.provenance import Provenance
from ntkgen.store.store import KernelStore
from ntkgen.training.recipe import Recipe as TrainingRecipe
from ntkgen.training.recipe import TrainingRequest

# Options of `ntkgen compute` by the field of the provenance, in the order in which they are written.
_OF_TRAINING = {"seed": "--seed", "width": "--width", "num_epochs": "--epochs", "target_accuracy": "--target-accuracy"}
_OF_SAMPLES = {
    "subsample": "--subsample",
    "shuffle_seed": "--shuffle-seed",
    "against": "--against",
    "against_subsample": "--against-subsample",
}

# Options of `ntkgen analyze` whose names differ from their settings, and the default values of settings.
_FLAGS = {"num_modes": "--modes"}
_USUAL = {
    "tolerance": defaults.TOLERANCE, "max_passes": defaults.MAX_PASSES, "bandwidth": defaults.BANDWIDTH,
    "shift": defaults.SHIFT, "q": defaults.Q, "powers": defaults.POWERS, "alpha": defaults.ALPHA,
    "holdout": defaults.HOLDOUT, "offset": defaults.OFFSET, "loss": defaults.LOSS, "rate": defaults.RATE,
    "num_modes": defaults.NUM_MODES,
}  # fmt: skip
# Settings that are not options, or that follow from the kernel and the memory.
_IMPLIED = {"method", "test"}


@dataclass(frozen=True)
class Recipe:
    """Commands that reproduce a kernel, and notes on what else they need and what the store does not record."""

    commands: tuple[str, ...]
    notes: tuple[str, ...]


def recipe_of(store: KernelStore) -> Recipe:
    """Return the commands that reproduce a store: `ntkgen compute`, a call in Python, or `ntkgen import`."""
    manifest = store.manifest
    made = manifest.provenance
    if made.imported_from is not None:
        return _imported(manifest, made.imported_from)
    if made.model is None or made.dataset is None or made.checkpoint is None:
        return _called(manifest)
    return _computed(manifest, made.model, made.dataset, made.checkpoint)


def _computed(manifest: Manifest, model: str, dataset: str, checkpoint: str) -> Recipe:
    made = manifest.provenance
    is_untrained = made.epochs == 0
    command = ["ntkgen", "compute", "--models", model, "--dataset", dataset]
    command += _options(dataclasses.replace(made, num_epochs=0) if is_untrained else made, _OF_TRAINING)
    if not is_untrained:
        command += _options(made, {"learning_rate": "--lr", "batch_size": "--bs"})
        command += ["--allow-unconverged"] * ((made.train_accuracy or 0.0) < TrainingRequest.target_accuracy)
    command += ["--raw-images"] * bool(made.raw_images)
    command += [*_options(made, _OF_SAMPLES), *_kernel_options(manifest)]
    notes = [_training_note(made, checkpoint)]
    if dataset.endswith(".npz"):
        notes.append(f"{dataset} is a file of the user. The store records only the fingerprint of its content.")
    return Recipe((shlex.join(command),), tuple(notes))


def _options(made: Provenance, flags: Mapping[str, str]) -> list[str]:
    """Write the options of all settings that the store records."""
    chosen = [(flag, getattr(made, name)) for name, flag in flags.items()]
    return [word for flag, value in chosen if value is not None for word in (flag, str(value))]


def _kernel_options(manifest: Manifest) -> list[str]:
    """Write the options for the computation and the storage of the kernel."""
    plan = manifest.plan
    output = manifest.output
    return [
        *([] if output == "full" else ["--output", output]),
        *("--precision", plan.precision, "--dtype", *manifest.dtypes),
        *("--layout", manifest.layout, "--tile", str(plan.grid.side)),
    ]


def _training_note(made: Provenance, checkpoint: str) -> str:
    """Write what the command needs for the same network, and what the store does not record."""
    if made.epochs == 0:
        return "The network is not trained. It is built from its seed, so that nothing else is needed."
    if made.num_epochs is not None:
        return (
            f"The command trains the network again. If {checkpoint} is in the folder of `ntkgen compute --out`, the "
            "command uses this network of the kernel instead."
        )
    return (
        f"Put {checkpoint} into the folder of `ntkgen compute --out`. It contains the network of this kernel and its "
        "training settings. Without it, the command trains a network for at most "
        f"{TrainingRecipe.num_epochs} epochs, because the store does not record the training settings."
    )


def question_command(kept: Kept[Answer], path: str) -> str:
    """Write the command that answers a question about a kernel again, with the same settings."""
    question = kept.answer.QUESTION
    words = ["ntkgen", "analyze", question, path, *["--prefixes"] * (question == "logdet")]
    asked = {name: value for name, value in kept.asked.items() if name not in _IMPLIED}
    for name, value in asked.items():
        if value is None or value is False or value == _USUAL.get(name):
            continue
        words.append(_FLAGS.get(name, f"--{name.replace('_', '-')}"))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    if isinstance(kept.answer, RegressAnswer | FlowAnswer) and kept.answer.test_store is not None:
        words += ["--test", kept.answer.test_store]
    return shlex.join(words)


def _called(manifest: Manifest) -> Recipe:
    output = manifest.output
    plan, dtypes = manifest.plan, tuple(manifest.dtypes)
    call = (
        f'ntkgen.compute(model, x, store="kernel.zarr", output={output!r}, dtypes={dtypes!r}, '
        f"precision={plan.precision!r})"
    )
    note = (
        "The kernel was computed from Python. The store records only the fingerprints of the network and of the "
        "samples. The same call is refused for another network or other samples."
    )
    return Recipe(("import ntkgen", call), (note,))


def _imported(manifest: Manifest, source: str) -> Recipe:
    grid = manifest.plan.grid
    words = ["ntkgen", "import", source, "--samples", str(grid.num_samples)]
    words += ["--outputs", str(grid.num_outputs)]
    if params := manifest.plan.profile.num_params:
        words += ["--params", str(params)]
    note = "The kernel was imported from a file of another program. That file does not record how it was computed."
    return Recipe((shlex.join(words),), (note,))


def citation(store: KernelStore | None = None) -> list[str]:
    """Write the citation as BibTeX: this program, and the paper that introduced the neural tangent kernel."""
    version = ntkgen.__version__
    note = [f"  note    = {{Kernel with the fingerprint {store.manifest.fingerprint[:16]}}}"] if store else []
    return [
        "@software{ntkgen,",
        "  author  = {{The ntkgen authors}},",
        "  title   = {ntkgen: large empirical neural tangent kernels},",
        "  year    = {2026},",
        f"  version = {{{version}}},",
        *note,
        "}",
        "@inproceedings{jacot2018neural,",
        "  author    = {Jacot, Arthur and Gabriel, Franck and Hongler, Cl{\\'e}ment},",
        "  title     = {Neural Tangent Kernel: Convergence and Generalization in Neural Networks},",
        "  booktitle = {Advances in Neural Information Processing Systems},",
        "  volume    = {31},",
        "  year      = {2018},",
        "  eprint    = {1806.07572},",
        "  archiveprefix = {arXiv}",
        "}",
    ]
