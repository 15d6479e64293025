"""How a kernel is made again, and how it is cited: from what its store says of itself, and nothing else."""

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

# Options that have the name of what they set, and those that have not, in the order in which they are written.
_OF_TRAINING = {"seed": "--seed", "width": "--width", "num_epochs": "--epochs", "target_accuracy": "--target-accuracy"}
_OF_SAMPLES = {
    "subsample": "--subsample",
    "shuffle_seed": "--shuffle-seed",
    "against": "--against",
    "against_subsample": "--against-subsample",
}

# Options of questions whose name is not that of the setting, and values that an option has unless it is given.
_FLAGS = {"num_modes": "--modes"}
_USUAL = {
    "tolerance": defaults.TOLERANCE, "max_passes": defaults.MAX_PASSES, "bandwidth": defaults.BANDWIDTH,
    "shift": defaults.SHIFT, "q": defaults.Q, "powers": defaults.POWERS, "alpha": defaults.ALPHA,
    "holdout": defaults.HOLDOUT, "offset": defaults.OFFSET, "loss": defaults.LOSS, "rate": defaults.RATE,
    "num_modes": defaults.NUM_MODES,
}  # fmt: skip
# Settings that follow from others, or from the kernel and the memory.
_IMPLIED = {"method", "test"}


@dataclass(frozen=True)
class Recipe:
    """What to run to make a kernel again, and what else is needed or not known."""

    commands: tuple[str, ...]
    notes: tuple[str, ...]


def recipe_of(store: KernelStore) -> Recipe:
    """Say how a store was made: by the command line, by a call in Python, or by importing a file."""
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
        notes.append(f"{dataset} is a file of one's own; the store knows its contents by their fingerprint.")
    return Recipe((shlex.join(command),), tuple(notes))


def _options(made: Provenance, flags: Mapping[str, str]) -> list[str]:
    """Write options for those of the settings that are known."""
    chosen = [(flag, getattr(made, name)) for name, flag in flags.items()]
    return [word for flag, value in chosen if value is not None for word in (flag, str(value))]


def _kernel_options(manifest: Manifest) -> list[str]:
    """Write how the kernel is computed and stored."""
    plan = manifest.plan
    output = manifest.output
    return [
        *([] if output == "full" else ["--output", output]),
        *("--precision", plan.precision, "--dtype", *manifest.dtypes),
        *("--layout", manifest.layout, "--tile", str(plan.grid.side)),
    ]


def _training_note(made: Provenance, checkpoint: str) -> str:
    """Say what the command needs to have the same network, and what the store does not record."""
    if made.epochs == 0:
        return "The network is taken as it is built from its seed: nothing else is needed."
    if made.num_epochs is not None:
        return (
            f"It trains the network anew. If {checkpoint} lies in the folder of `ntkgen compute --out`, it takes the "
            "network of this very kernel from there."
        )
    return (
        f"Put {checkpoint} into the folder of `ntkgen compute --out`: it holds the network of this very kernel, and "
        "how that was trained. Without it the network is trained anew, for at most "
        f"{TrainingRecipe.num_epochs} epochs; the store does not record another choice."
    )


def question_command(kept: Kept[Answer], path: str) -> str:
    """Write the command that asks a question of a kernel again, with what was asked."""
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
        "The kernel was made in Python. The store knows the network and the samples by their fingerprints alone: "
        "with others the same call is refused."
    )
    return Recipe(("import ntkgen", call), (note,))


def _imported(manifest: Manifest, source: str) -> Recipe:
    grid = manifest.plan.grid
    words = ["ntkgen", "import", source, "--samples", str(grid.num_samples)]
    words += ["--outputs", str(grid.num_outputs)]
    if params := manifest.plan.profile.num_params:
        words += ["--params", str(params)]
    note = "The kernel was imported from a file of another program; how it was computed, that file does not say."
    return Recipe((shlex.join(words),), (note,))


def citation(store: KernelStore) -> list[str]:
    """Write how to cite the kernel, as BibTeX: the program that made it, and the paper that defined it."""
    version = ntkgen.__version__
    return [
        "@software{ntkgen,",
        "  author  = {{The ntkgen authors}},",
        "  title   = {ntkgen: large empirical neural tangent kernels, exact, fast, resumable},",
        f"  version = {{{version}}},",
        f"  note    = {{Kernel with the fingerprint {store.manifest.fingerprint[:16]}}}",
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
