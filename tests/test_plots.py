"""Pictures: what they show is true, their texts do not overlap, they can be read in grey; and `ntkgen plot`."""

import dataclasses
import importlib
import io
import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from cases import chosen
from filled import answer_of, fill_store, gram
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from strategies import few

from ntkgen import analysis, cli
from ntkgen.analysis import answers
from ntkgen.analysis.alignment import AlignAnswer
from ntkgen.analysis.answers import gather
from ntkgen.analysis.determinant import LogdetAnswer
from ntkgen.analysis.eigenvalue_density import DensityAnswer
from ntkgen.analysis.eigenvalues import SpectrumAnswer
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.plots import draw as plots
from ntkgen.analysis.plots import matrix as plots_matrix
from ntkgen.analysis.plots import style as plots_style
from ntkgen.analysis.plots.matrix import decimate, draw_matrix, orders_of
from ntkgen.analysis.plots.style import LINES, render
from ntkgen.analysis.regression import RegressAnswer
from ntkgen.cli import options, progress

LABELS = np.array([2, 0, 1, 0, 2, 1, 1])
MEMORY = 10**12
command = importlib.import_module("ntkgen.cli.plot")  # which the command of that name hides


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store of 7 samples and 3 outputs."""
    return fill_store(tmp_path_factory.mktemp("plots") / "k.zarr", labels=LABELS, num_outputs=3)


@pytest.fixture
def matrix(stored):
    return open_matrix(stored[0])


# the matrix -----------------------------------------------------------------------------------------------------------


@few
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    m=st.integers(1, 3),
    tile=st.integers(1, 4),
    layout=st.sampled_from(["upper", "full"]),
    cells=st.integers(1, 30),
)
def test_pixels_are_true_means_of_blocks(tmp_path_factory, labels, m, tile, layout, cells):
    labels = np.array(labels)
    path = tmp_path_factory.mktemp("k") / "k.zarr"
    store, K = fill_store(path, labels=labels, num_outputs=m, tile_samples=tile, layout=layout)
    matrix = open_matrix(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots_matrix, "MAX_CELLS", cells)
        rows, samples, has_labels = orders_of(matrix)
        whole, traced = decimate(matrix, rows, samples)
    assert has_labels == bool((labels >= 0).all())
    n, within = len(labels), labels if has_labels else np.zeros(len(labels), int)
    by_sample = np.lexsort((np.arange(n), within))
    by_row = (by_sample[None, :] * m + np.arange(m)[:, None]).ravel()  # outputs outside, samples inside
    trace = sum(K[a::m, a::m] for a in range(m)) / m
    np.testing.assert_allclose(whole.means, means(K[np.ix_(by_row, by_row)], cells), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(traced.means, means(trace[np.ix_(by_sample, by_sample)], cells), rtol=1e-10, atol=1e-12)
    assert matrix.passes == 1


def means(K, cells):
    """Means of square blocks, one by one."""
    size = -(-len(K) // cells)
    starts = range(0, len(K), size)
    return np.array([[K[i : i + size, j : j + size].mean() for j in starts] for i in starts])


def test_the_groups_are_marked_where_they_begin(matrix):
    rows, samples, _ = orders_of(matrix)
    assert samples.names == ("0", "1", "2")
    assert list(samples.bounds) == [0, 2, 5, 7]
    assert rows.names == ("0", "1", "2")
    assert list(rows.bounds) == [0, 7, 14, 21]
    axes = draw_matrix(matrix).figure.axes
    lines = sorted({line.get_xdata()[0] for line in axes[1].lines if line.get_xdata()[0] == line.get_xdata()[-1]})
    assert lines == [2, 5]
    assert "by output, then label" in axes[0].get_title(loc="left")


def test_a_kernel_without_labels_says_how_it_is_ordered(tmp_path):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.full(4, -1), num_outputs=2)
    axes = draw_matrix(open_matrix(store)).figure.axes
    assert "place in the store" in axes[1].get_title(loc="left")
    assert axes[1].get_xlabel() == "sample"


def test_the_scale_is_the_signed_root_and_says_so(matrix):
    values = np.array([-4.0, -0.25, 0.0, 9.0])
    np.testing.assert_array_equal(plots_matrix.signed_root(values), [-2, -0.5, 0, 3])
    np.testing.assert_array_equal(plots_matrix.signed_square(plots_matrix.signed_root(values)), values)
    figure = draw_matrix(matrix).figure
    assert sum("signed square-root scale" in text for text in texts(figure)) == 2
    (image,) = figure.axes[0].images
    assert image.norm.vmax == np.abs(image.get_array()).max()


def test_memory_is_that_of_tiles_and_pixels(tmp_path, monkeypatch):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.arange(40) % 4, num_outputs=1, tile_samples=4)
    monkeypatch.setattr(plots_matrix, "MAX_CELLS", 8)
    matrix, shapes = open_matrix(store), []
    add = plots_matrix._add
    monkeypatch.setattr(
        plots_matrix, "_add", lambda sums, values, *rest: (shapes.append(values.shape), add(sums, values, *rest))
    )
    draw_matrix(matrix)
    assert max(max(shape) for shape in shapes) == 4


# every picture --------------------------------------------------------------------------------------------------------


def every_picture(store):
    """All pictures of a store, and that of its law."""
    matrix = open_matrix(store)
    found = gather(matrix, MEMORY)
    pictures = plots.draw_all(found, plots.KINDS)
    assert set(pictures) == set(plots.KINDS) - {"comparison"}
    return list(pictures.values())


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def boxes(figure):
    """Where each text that can be seen lies, after the layout."""
    with plots_style.styled():
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    seen = []
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text().strip():
            continue
        box = text.get_window_extent(renderer)
        ticks = [
            axis
            for axes in figure.axes
            for axis in (axes.xaxis, axes.yaxis)
            if text in axis.get_ticklabels(which="both")
        ]
        if ticks and not is_inside(ticks[0], text):
            continue  # of a tick beyond the axis, which is not drawn
        seen.append((text.get_text(), box))
    return seen


def is_inside(axis, text):
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[0 if axis.axis_name == "x" else 1]
    return low - 1e-9 <= place <= high * (1 + 1e-9) + 1e-12


def assert_readable(figure):
    """No text covers another one, or leaves the picture."""
    seen, whole = boxes(figure), figure.bbox
    for text, box in seen:
        assert whole.x0 - 1 <= box.x0 <= box.x1 <= whole.x1 + 1, text
        assert whole.y0 - 1 <= box.y0 <= box.y1 <= whole.y1 + 1, text
    for (text, box), (other, second) in itertools.combinations(seen, 2):
        width = min(box.x1, second.x1) - max(box.x0, second.x0)
        height = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert width <= 1 or height <= 1, f"{text!r} covers {other!r}"


SHAPES = {  # labels, outputs
    "usual": (LABELS, 3),
    "one output": (np.array([0, 0, 0, 0, 0]), 1),
    "many classes": (np.arange(30) % 15, 15),
}


@pytest.fixture(scope="module", params=chosen(SHAPES, ["usual"]))
def pictures(request, tmp_path_factory):
    labels, m = SHAPES[request.param]
    path = tmp_path_factory.mktemp("plots") / "k.zarr"
    K = gram(len(labels) * m) * (1e7 if request.param == "many classes" else 1)
    certificate = {"num_probes": 10, "num_pairs": 16, "seed": 0, "kernel_norm": 1.0, "errors": [
        {"dtype": "float64", "error": 1e-3, "bound": 2e-3, "relative_error": 1e-5, "relative_bound": 2e-5,
         "max_pair_error": 1e-6, "block_errors": [], "suspicious": []}]}  # fmt: skip
    store, _ = fill_store(path, K, labels=labels, num_outputs=m, tile_samples=8, certificate=certificate)
    return every_picture(store)


@pytest.mark.slow
def test_no_text_covers_another(pictures):
    for picture in pictures:
        assert_readable(picture.figure)


def test_every_axis_says_what_it_is(pictures):
    for picture in pictures:
        for axes in picture.figure.axes:
            is_bar = axes.get_label() == "<colorbar>"
            assert axes.get_xlabel(), picture.kind
            assert is_bar or axes.get_ylabel(), picture.kind
            assert is_bar or axes.get_title(loc="left"), picture.kind


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_pictures_are_files_of_both_formats(pictures, step):
    for picture in pictures[::step]:
        pixels = imread(io.BytesIO(render(picture, "png")))
        assert pixels.shape[1] == round(plots_style.WIDTH * 200)
        assert len(np.unique(pixels[::5, ::5, 0])) > 5
        svg = render(picture, "svg")
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b'href="http' not in svg
        assert b"<text" not in svg  # shapes, which need no font


@pytest.mark.slow
def test_equal_pictures_have_equal_bytes(matrix):
    picture, same = draw_matrix(matrix), draw_matrix(matrix)
    for form in plots_style.FORMATS:
        first = render(picture, form)
        assert first == render(picture, form)
        assert first == render(same, form)


def test_captions_say_numbers(pictures):
    for picture in pictures:
        assert any(letter.isdigit() for letter in picture.caption), picture.kind
        assert picture.caption.endswith(".")
        assert "-" not in [word[0] for word in picture.caption.split() if word[1:2].isdigit()]  # a true minus


def test_the_style_is_set_back(matrix):
    before = dict(mpl.rcParams)
    render(draw_matrix(matrix), "svg")
    assert dict(mpl.rcParams) == before


def test_series_are_told_apart_without_colour():
    assert len({(str(line.linestyle), line.marker) for line in LINES}) == len(LINES)
    lightness = sorted(np.dot(to_rgb(line.color), [0.2126, 0.7152, 0.0722]) for line in LINES[:4])
    assert min(np.diff(lightness)) > 0.05
    steps = np.dot(
        mpl.colormaps[plots_style.STYLE["image.cmap"]](np.linspace(0, 1, 64))[:, :3], [0.2126, 0.7152, 0.0722]
    )
    assert (np.diff(steps) > 0).all()


# what the others show -------------------------------------------------------------------------------------------------


def test_the_spectrum_shows_what_is_negative_and_what_is_not_known():
    from ntkgen.analysis.plots.spectrum import draw_spectrum

    values, bounds = [4.0, 1.0, -0.5], [0.5, 0.5, 0.5]
    result = answer_of(
        SpectrumAnswer, eigenvalues=values, residual_bounds=bounds, trace=4.5, rows=3, effective_rank=2.0
    )

    picture = draw_spectrum(result, error_norm=0.6)
    labels = texts(picture.figure)
    assert "|λₖ| of negative ones" in labels
    assert "± residual bound" in labels
    assert any("certificate" in label for label in labels)
    assert "0.6" in picture.caption
    lines = {line.get_label(): line.get_xydata() for line in picture.figure.axes[0].lines}
    np.testing.assert_array_equal(lines["eigenvalue λₖ"], [[1, 4], [2, 1]])
    np.testing.assert_array_equal(lines["|λₖ| of negative ones"], [[3, 0.5]])
    np.testing.assert_allclose(picture.figure.axes[1].lines[0].get_ydata(), np.array([4, 5, 4.5]) / 4.5 * 100)
    assert_readable(picture.figure)
    assert "The 3 largest of 10" in draw_spectrum(dataclasses.replace(result, rows=10)).caption


@pytest.mark.slow
def test_the_determinant_is_drawn_against_whole_samples():
    from ntkgen.analysis.plots.logdet import draw_logdet

    prefixes = {"prefixes": [-1.0, -3.0, -4.0, -8.0], "prefix_rows": [1, 2, 3, 4]}
    result = answer_of(LogdetAnswer, **prefixes, rows=4, logdet=-8.0, sign=1, shift=0.0)
    left, right = draw_logdet(result, 2).figure.axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), [[1, -3], [2, -8]])
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [[2, -5]])
    assert "−8" in draw_logdet(result, 2).caption


@pytest.mark.slow
def test_the_law_goes_on_to_where_it_was_asked_for(tmp_path):
    from ntkgen.analysis.extrapolation import ExtrapolateSettings, extrapolate

    store, _ = fill_store(tmp_path / "k.zarr", labels=np.arange(30) % 3, num_outputs=1)
    matrix = open_matrix(store)
    law = extrapolate(matrix, ExtrapolateSettings(100, memory_bytes=MEMORY))
    found = gather(matrix, MEMORY, plots.questions_for(["logdet"]))
    picture = plots.draw_all(found, ["logdet"])["logdet"]
    curve = next(line for line in picture.figure.axes[0].lines if "fitted law" in str(line.get_label()))
    assert curve.get_xdata()[-1] == 100
    np.testing.assert_allclose(curve.get_ydata()[-1], law.logdet)
    assert "for 100 samples" in picture.caption
    assert_readable(picture.figure)


def test_regression_is_drawn_with_gaps_where_nobody_knows():
    from ntkgen.analysis.plots.regression import draw_regression

    errors = {"train_error": [0.1, 0.2], "loo_error": [None, None], "gcv": [0.4, 0.3]}
    result = answer_of(RegressAnswer, shifts=[0.1, 1.0], **errors, train_accuracy=[1.0, 0.5])
    picture = draw_regression(result)
    drawn = {line.get_label(): line for line in picture.figure.axes[0].lines}
    assert set(drawn) == {"training", "generalised cross-validation"}
    np.testing.assert_array_equal(picture.figure.axes[1].lines[0].get_ydata(), [100, 50])
    assert "λ = 1" in picture.caption
    assert {line.get_linestyle() for line in picture.figure.axes[0].lines} == {"-", "-."}


# answers --------------------------------------------------------------------------------------------------------------


def test_what_was_asked_before_is_read_and_nothing_else_of_a_large_kernel(tmp_path, monkeypatch):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=3)
    matrix = open_matrix(store)
    known = gather(matrix, MEMORY, ["align"]).get(AlignAnswer)
    monkeypatch.setattr(answers, "is_small", lambda *_: False)
    monkeypatch.setattr(answers, "_COMPUTING", dict.fromkeys(answers._COMPUTING))
    found = gather(matrix, MEMORY)
    assert found.get(AlignAnswer).alignment == known.alignment
    assert set(found.lacking) == set(answers.QUESTIONS) - {"align", "extrapolate"}
    assert "Run that command first" in found.lacking["logdet"]
    assert "ntkgen analyze logdet" in found.lacking["logdet"]


def test_a_kernel_is_small_if_it_fits_with_its_eigenvectors(matrix):
    import psutil

    taken = psutil.Process().memory_info().rss
    assert answers.is_small(matrix, taken + 10**8)
    matrix.num_rows = 10**4
    assert not answers.is_small(matrix, taken + 10**8)


@pytest.mark.parametrize("damage", ["cut", "fingerprint", "rows"])
def test_results_of_another_kernel_are_not_taken(tmp_path, damage):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=3)
    matrix = open_matrix(store)
    gather(matrix, MEMORY, ["align"])
    (file,) = tmp_path.glob("*.analysis/align-*.json")
    result = json.loads(file.read_text())
    result["alignment"] = 77.0
    if damage != "cut":
        result["identity"][damage] = "other"
    file.with_name("align-000000000000.json").write_text(json.dumps(result)[: 40 if damage == "cut" else None])
    assert gather(matrix, MEMORY, ["align"]).get(AlignAnswer).alignment != 77.0


def test_the_richest_result_is_taken():
    poor, rich = (answer_of(SpectrumAnswer, eigenvalues=values) for values in ([1], [1, 2]))
    assert answers._richness(rich) > answers._richness(poor)
    shifted, plain = (answer_of(LogdetAnswer, prefixes=[1], shift=shift) for shift in (2.0, 0.0))
    assert answers._richness(plain) > answers._richness(shifted)


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args):
        code = cli.run([*map(str, args), "--memory", "1TB"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def test_the_command_draws_what_was_asked_for(run, stored):
    code, out, err = run("plot", stored[0].name, "--kind", "matrix", "alignment", "--format", "png", "svg", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    names = [Path(made["file"]).name for made in result["pictures"]]
    assert names == ["k-matrix.png", "k-matrix.svg", "k-alignment.png", "k-alignment.svg"]
    assert all(Path(made["file"]).stat().st_size > 5000 for made in result["pictures"])
    assert result["store"] == stored[0].name
    assert result["peak_bytes"] > 0
    assert {path.parent for path in map(Path, (made["file"] for made in result["pictures"]))} == {Path("plots")}


@pytest.mark.slow
def test_the_command_draws_all_it_can(run, stored):
    code, out, _ = run("plot", stored[0].name, "-o", "here")
    assert code == 0
    kinds = {path.stem.removeprefix("k-") for path in Path("here").iterdir()}
    assert kinds == set(command.KINDS) - {"comparison"}
    assert "here/k-spectrum.png" in out


def test_the_kinds_of_the_command_are_those_there_are():
    assert set(command.KINDS) == set(plots.KINDS)
    assert options.FORMATS == plots_style.FORMATS


def test_a_kind_that_cannot_be_drawn_is_an_error_if_it_was_asked_for(run, tmp_path, monkeypatch):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.full(4, -1), num_outputs=2)
    code, out, err = run("plot", store.name, "--kind", "regression")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has no labels" in err
    monkeypatch.setattr(command, "KINDS", ("matrix", "regression"))
    code, out, _ = run("plot", store.name)
    assert code == 0
    assert "no regression: The store at" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.zarr"], "There is no kernel store at"),
        (["STORE", "--kind", "pie"], "'pie' is not one of"),
        (["STORE", "--format", "gif"], "'gif' is not one of"),
        (["STORE", "-o", "file/below"], "Nothing can be written below"),
    ],
)
def test_bad_input_is_one_line_and_draws_nothing(run, stored, args, message):
    Path("file").write_text("")
    code, out, err = run("plot", *[stored[0].name if arg == "STORE" else arg for arg in args])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not Path("plots").exists()


@pytest.mark.slow
def test_stores_of_one_name_get_pictures_of_two(run, tmp_path):
    for folder in ("a", "b"):
        fill_store(tmp_path / folder / "k.zarr", labels=LABELS, num_outputs=1)
    assert run("plot", "a/k.zarr", "b/k.zarr", "--kind", "matrix")[0] == 0
    assert sorted(path.name for path in Path("plots").iterdir()) == ["k-2-matrix.png", "k-matrix.png"]


def test_every_stage_of_the_analysis_has_a_unit_in_the_progress_bars():
    folder = Path(analysis.__file__).parent
    calls = re.compile(r'(?:counter\((?:self\._)?report, |\breport\()"([^"]+)"')
    stages = {stage for file in folder.rglob("*.py") for stage in calls.findall(file.read_text())}
    assert "block means" in stages
    assert stages <= set(progress._UNITS)


def test_the_columns_are_not_called_rows(matrix):
    axes = draw_matrix(matrix).figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output of the column", "output of the row")


def test_the_density_counts_the_eigenvalues_below_the_certificate():
    from ntkgen.analysis.plots.spectrum import draw_density

    answer = answer_of(
        DensityAnswer,
        method="all",
        log10_eigenvalues=[-2.0, -1.0, 0.0, 1.0],
        density=[0.1, 0.4, 0.4, 0.1],
        density_errors=[0.0] * 4,
        fraction_above=[1.0, 0.75, 0.25, 0.0],
        fraction_off_axis=0.0,
        resolved_above=None,
        error_norm=0.1,
        bandwidth=0.1,
    )
    assert "25 % of the eigenvalues are below" in draw_density(answer).caption
