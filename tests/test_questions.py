"""One shape for every question: settings in, an answer out, whose JSON is what is printed and kept."""

import dataclasses
import json
import subprocess
import sys

import pytest
from filled import MEMORY, drawn, filled, rectangle

from ntkgen import analysis
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.results import kept_answers

START, END = ["store", "dtype", "rows"], ["seconds", "peak_bytes", "remembered"]
# The keys of `--json`, which are a promise, and of what lies beside a store but for `identity`.
KEYS = {
    "spectrum": """method eigenvalues residual_bounds error_bounds is_converged is_proven trace frobenius_norm
        participation_ratio stable_rank effective_rank effective_rank_error smallest smallest_error condition
        condition_error num_negative error_norm num_above_error passes""",
    "density": """method probes log10_eigenvalues density density_errors fraction_above fraction_off_axis resolved_above
        bandwidth error_norm passes""",
    "logdet": """logdet sign shift logdet_per_row inertia smallest_pivot tile_rows panel_rows panels bytes_kept_planned
        bytes_read_planned factor_bytes gflops error_norm prefixes prefix_rows prefix_signs smallest_eigenvalue_bound
        warnings""",
    "extrapolate": """to to_rows logdet logdet_per_row nu nu_per_output coefficients column_scales condition q powers
        alpha burn_in unit num_outputs prefixes_used fitted_from fitted_to rms_residual holdout_logdet holdout
        holdout_from holdout_error holdout_error_relative holdout_error_per_row""",
    "regress": """shifts train_error loo_error gcv train_accuracy loo_accuracy gcv_standard_error residual_bounds output
        samples error_norm passes test_accuracy test_error test_store offset method""",
    "flow": """times train_loss train_accuracy error_bounds eigenvalues learning_times energies energy_of_others loss
        rate offset normalisation output samples passes test_store test_accuracy test_error method""",
    "align": """alignment centered_alignment output_names output_alignment output_centered_alignment output samples
        passes""",
    "compare": """distance centered_alignment principal_angles angle_error eigenvalues reference_eigenvalues
        eigenvalue_ratios gaps cost samples samples_are_known passes""",
}
AFTERWARDS = {"extrapolate": ["shift", "warnings"], "compare": ["reference", "reference_dtype"]}
ANSWERS = {question: getattr(analysis, f"{question.capitalize()}Answer") for question in KEYS}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    content = drawn(20, 3)
    low = dataclasses.replace(content, precision="tf32")
    made = {"k": content, "low": low, "t": rectangle(content, num_test=8)}
    return {name: filled(folder / f"{name}.zarr", each) for name, each in made.items()}


@pytest.fixture
def questions(stores):
    """Each question, asked with settings that have every optional part of its answer."""
    memory = {"memory_bytes": MEMORY}
    matrix, test = open_matrix(stores["k"]), stores["t"]
    return {
        "spectrum": lambda: analysis.spectrum(matrix, analysis.SpectrumSettings(**memory)),
        "density": lambda: analysis.density(matrix, analysis.DensitySettings(**memory)),
        "logdet": lambda: analysis.logdet(matrix, analysis.LogdetSettings(prefixes=True, **memory)),
        "extrapolate": lambda: analysis.extrapolate(
            matrix, analysis.ExtrapolateSettings(100, burn_in=1, q=0, **memory)
        ),
        "regress": lambda: analysis.regress(matrix, analysis.RegressSettings((1.0, 2.0), test=test, **memory)),
        "flow": lambda: analysis.flow(matrix, analysis.FlowSettings(times=(0.1, 1.0), test=test, **memory)),
        "align": lambda: analysis.align(matrix, analysis.AlignSettings(**memory)),
        "compare": lambda: analysis.compare(open_matrix(stores["low"]), matrix, analysis.CompareSettings(3, **memory)),
    }


@pytest.mark.parametrize("question", KEYS)
def test_the_keys_are_a_promise(questions, stores, question):
    answer = questions[question]()
    keys = [*START, *KEYS[question].split(), *END]
    assert list(answer.to_json()) == [*keys, *AFTERWARDS.get(question, [])]
    (kept,) = kept_answers(open_matrix(stores["k"]), [ANSWERS[question]])
    assert list(kept.answer.to_keep()) == keys
    json.dumps(answer.to_json(), allow_nan=False)


@pytest.mark.parametrize("question", KEYS)
def test_an_answer_is_the_same_when_it_is_read_again(questions, question):
    answer = questions[question]()
    again = questions[question]()
    assert again.remembered
    assert again == dataclasses.replace(answer, remembered=True)
    assert ANSWERS[question].from_json(json.loads(json.dumps(again.to_json()))) == again


@pytest.mark.parametrize("question", KEYS)
def test_answers_and_settings_cannot_be_changed(questions, question):
    answer, settings = questions[question](), getattr(analysis, f"{question.capitalize()}Settings")
    assert issubclass(settings, Settings)
    assert settings.__dataclass_params__.frozen
    assert isinstance(answer, ANSWERS[question])
    assert isinstance(answer, Answer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.rows = 1


def test_a_kept_answer_that_lacks_a_number_is_computed_again(questions, stores, tmp_path):
    matrix = open_matrix(stores["k"])
    before = questions["align"]()
    (file,) = (matrix.store.folder.parent.path / "k.zarr.analysis").glob("align-*.json")
    kept = json.loads(file.read_text())
    unknown = {**kept, "of_a_later_version": 1}
    file.write_text(json.dumps(unknown))
    assert questions["align"]().remembered
    file.write_text(json.dumps({name: value for name, value in kept.items() if name != "alignment"}))
    again = questions["align"]()
    assert not again.remembered
    assert again.alignment == before.alignment


EXPORTS = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision"]))
import ntkgen.analysis as analysis
assert "numpy" not in sys.modules and "zarr" not in sys.modules
for name in analysis.__all__:
    assert name in dir(analysis) and callable(getattr(analysis, name)), name
from ntkgen.analysis import align, compare, density, extrapolate, flow, logdet, regress, spectrum
assert callable(spectrum) and callable(analysis.flow)
"""


def test_the_package_exports_all_questions_without_torch():
    done = subprocess.run([sys.executable, "-c", EXPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_hides_a_question():
    for name in analysis.__all__:
        assert callable(getattr(analysis, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = analysis.nothing
