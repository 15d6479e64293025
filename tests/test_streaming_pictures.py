"""Tables, notes and pictures of several streams: names, what differs, legends, kernels and utilities."""

import csv
import io

import numpy as np
import pytest
import xarray

from ntkgen.analysis.plots.style import render
from ntkgen.cli.cl_stream_results import pictures_of_streams
from ntkgen.continual.plots.lines import LETTERS, style_of
from ntkgen.continual.plots.streaming import OF_KERNELS, SHOWN, best_names, curves_of, draw_kernels, draw_streams
from ntkgen.continual.plots.utilities import draw_utilities
from ntkgen.continual.series import ROOT
from ntkgen.continual.streaming import tables
from ntkgen.continual.streaming.comparing import PLACE, notes_on, settings_of
from ntkgen.continual.streaming.labels import labels_of
from ntkgen.continual.streaming.record import in_words
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streaming.summary import held_out_of, rows_of, table
from ntkgen.continual.streaming.tables import stream_tables, unique_stems


def measured(place="runs/a", bins=3, diverged=(), **values):
    """What a run has measured, of random numbers. The named combinations and seeds diverge in the second task."""
    usual = {"num_samples": 90, "samples_per_task": 30, "seeds": (0, 1), "held_out": 5}
    settings = StreamingSettings(**{**usual, **values})
    shape, rng = (bins, len(settings.combinations), len(settings.seeds)), np.random.default_rng(0)
    dims = ("bin", "combination", "seed")
    found = {name: (dims, rng.random(shape)) for name in ("loss", "accuracy", "plasticity")}
    for combination, seed in diverged:
        for _, array in found.values():
            array[1:, combination, seed] = np.nan
    held_out = rng.random((-(-bins * 30 // settings.permuted.period), *shape[1:]))
    if settings.held_out:
        found["held_out_accuracy"] = (("task", *dims[1:]), held_out)
    coords = {
        "samples": ("bin", 30 * np.arange(1, bins + 1)),
        "combination": [in_words(options) for options in settings.combinations],
        "seed": list(settings.seeds),
    }
    return xarray.Dataset(found, coords, {"settings": settings.to_json(), PLACE: place})


def legend_of(picture):
    (legend,) = picture.figure.legends
    return [text.get_text() for text in legend.get_texts()], legend


def require_inside(picture):
    """Require that legend and title end within the figure."""
    picture.figure.draw_without_rendering()
    box = picture.figure.bbox
    for artist in (*picture.figure.legends, picture.figure._suptitle):
        found = artist.get_window_extent()
        assert found.x0 >= 0
        assert found.x1 <= box.x1
        assert found.y0 >= 0
        assert found.y1 <= box.y1


def test_notes_say_what_is_not_finished_and_what_differs():
    assert notes_on([measured(), measured(method="usgd")]).all == []
    notes = notes_on([measured(), measured("runs/b", bins=1, dataset="mnist", seeds=(2,))])
    assert notes.hindering == (
        "runs/b is not finished: 30 of 90 samples are learnt", "the runs differ in dataset: digits; mnist"
    )  # fmt: skip
    assert notes.others == ("the runs differ in seeds: 0 1; 2",)
    assert "not finished" in draw_streams([measured(bins=1)]).figure._suptitle.get_text()
    assert rows_of(measured(bins=0)) == []


def test_held_out_accuracy_is_in_tables_and_pictures():
    run = measured(learning_rate=(0.1, 0.2), diverged=[(1, 0)])
    first, second = rows_of(run)
    np.testing.assert_array_equal(first.held_out, run.held_out_accuracy.values[:, 0].mean(0))
    assert np.isnan(second.held_out[0])
    assert first.to_json()["held_out_accuracy"]["values"] == first.held_out.tolist()
    text = table([first, second])
    assert text[0].endswith("held-out accuracy")
    assert f"{first.held_out.mean():.4f} ±" in text[1]
    assert held_out_of(run).samples.values.tolist() == [30, 60, 90]
    (found,) = csv.DictReader(table([first], "csv"))
    assert float(found["held_out_accuracy"]) == pytest.approx(first.held_out.mean())
    curve = curves_of([run], "held_out_accuracy", last=2)[0]
    np.testing.assert_array_equal(curve.values, run.held_out_accuracy.values[-2:, 0])
    assert [axes.get_title("left") for axes in draw_streams([run]).figure.axes][-1] == "Held-out accuracy"
    other = measured(held_out=0)
    assert held_out_of(other) is None
    assert not table(rows_of(other))[0].endswith("held-out accuracy")


def test_all_tables_of_a_stream_are_written():
    run = measured(learning_rate=(0.1, 0.2))
    found = stream_tables(run)
    assert set(found) == {"bins", "held-out"}
    rows = list(csv.DictReader(io.StringIO(found["bins"].decode())))
    assert len(rows) == 3 * 2 * 2
    assert rows[0]["combination"] == "sgd, lr 0.1"
    assert float(rows[0]["loss"]) == run.loss.values[0, 0, 0]
    row = next(csv.DictReader(io.StringIO(found["held-out"].decode())))
    assert row["samples"] == "30"
    assert unique_stems(["g/x/raw", "g/y/raw"]) == ["x-raw", "y-raw"]


def test_many_and_long_names_fit_into_the_legend():
    rates = tuple(0.001 * number for number in range(1, 25))
    picture = draw_streams([measured(learning_rate=rates)])
    names, _ = legend_of(picture)
    assert len(names) == SHOWN == len(best_names([measured(learning_rate=rates)]))
    assert "20 combinations of 24" in picture.figure._suptitle.get_text()
    require_inside(picture)
    styles = [style_of(index, SHOWN, 3) for index in range(SHOWN)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == SHOWN
    places = ["/".join(["a folder"] * 12), "/".join(["another"] * 14)]
    runs = [measured(place, diverged=[(0, 1)]).assign_coords(label=("combination", [place])) for place in places]
    picture = draw_streams(runs)
    names, legend = legend_of(picture)
    assert max(len(line) for name in names for line in name.split("\n")) <= LETTERS
    assert all(name.replace("\n", " ").endswith("(1 of 2 diverged)") for name in names)
    assert legend.get_title().get_text() == "mean over 2 seeds ± standard error"
    require_inside(picture)


def test_kernels_of_all_combinations_are_drawn():
    run = measured(learning_rate=(0.1, 0.2, 0.3))
    names = ("effective_rank", "distance")
    kernels = [
        [xarray.Dataset({name: ("time", [row, 1.0]) for name in names}, {"iteration": ("time", [0, 90])})] * 2
        for row in range(3)
    ]
    picture = draw_kernels(run, kernels)
    assert legend_of(picture)[0] == labels_of(run)
    for axes in picture.figure.axes[1:]:
        assert [line.get_ydata()[0] for line in axes.lines] == [0, 1, 2]
    assert render(picture, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [({"num_samples": 80}, [30, 60]), ({"bins": "published"}, [60, 90]), ({}, [30, 60, 90])],
)
def test_lines_have_whole_tasks_alone_and_ticks_where_they_end(settings, drawn):
    run = measured(held_out=0)
    picture = draw_streams([run.assign_attrs(settings=run.attrs["settings"] | settings)])
    for axes in picture.figure.axes:
        assert axes.lines[0].get_xdata().tolist() == drawn
    assert ("Lines have whole tasks alone." in picture.caption) == (len(drawn) < 3)
    assert picture.figure.axes[0].get_xticks().tolist() == drawn


def test_a_single_point_has_bars():
    run = measured(learning_rate=(0.1, 0.2))
    picture = draw_streams([run], last=1)
    assert picture.figure._suptitle.get_text().endswith(", the last task")
    axes = picture.figure.axes[0]
    bars = [container.lines[2][0].get_segments()[0] for container in axes.containers]
    heights = [bar[1, 1] - bar[0, 1] for bar in bars]
    expected = run.accuracy.values[-1].std(1, ddof=1) / 2**0.5
    np.testing.assert_allclose(heights, 2 * expected)
    assert legend_of(picture)[0] == labels_of(run)


def test_kernels_of_diverged_combinations_are_left_out():
    run = measured(learning_rate=(0.1, 0.2), diverged=[(0, 1)])
    times = {"iteration": ("time", [0, 90])}

    def kernels_with(last):
        return xarray.Dataset(dict.fromkeys(OF_KERNELS, ("time", [1.0, last])), times)

    kernels = [[kernels_with(last) for last in row] for row in ((2.0, np.nan), (2.0, 3.0))]
    axes = draw_kernels(run, kernels).figure.axes
    (line,) = axes[1].lines
    assert line.get_ydata().tolist() == [1.0, 2.5]
    assert line.get_color() == axes[0].lines[1].get_color()


def test_missing_kernels_are_told(tmp_path, monkeypatch):
    place = str(tmp_path / "r")
    run = measured(place, kernels_every=1)
    monkeypatch.setattr(tables, "read_measured", lambda _: [run])
    root = tmp_path / "r" / "seed0" / "kernels.zarr" / ROOT
    root.parent.mkdir(parents=True)
    root.write_text("{}")
    assert tables.missing_kernels(place, settings_of(run)) == ["seed1/kernels.zarr"]
    (_, (found, _, (pictures, left_out))) = pictures_of_streams([place], [place], None)
    assert found == place
    assert pictures == []
    assert "found none at seed1/kernels.zarr" in left_out["stream-kernels"]


@pytest.mark.parametrize("channels", [1, 3])
def test_utilities_of_combinations_are_apart_and_diverged_networks_left_out(channels):
    run = measured(method="usgd", sigma=(0.1, 0.2), diverged=[(0, 0)])
    rng = np.random.default_rng(0)
    utilities = {"0.weight": rng.random((4, 6, channels, 3, 3)), "0.bias": rng.random((4, 6))}
    utilities = {name: values.astype(np.float32) for name, values in utilities.items()}
    utilities["0.weight"][0] = np.nan
    boxes, images = draw_utilities(utilities, run)
    assert legend_of(boxes)[0] == ["usgd, sigma 0.1", "usgd, sigma 0.2"]
    title = boxes.figure._suptitle.get_text().replace("\n", " ")
    assert "label-permuted digits" in title
    assert "1 of 4 networks diverged" in title
    medians = [line.get_ydata()[0] for line in boxes.figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert min(abs(np.median(utilities["0.weight"][1]) - median) for median in medians) < 1e-6
    title = images.figure._suptitle.get_text().replace("\n", " ")
    assert "one network, usgd, sigma 0.2, seed 0" in title  # that of sigma 0.1 has diverged
    assert len([axes for axes in images.figure.axes if axes.images]) == 6 * channels
    assert images.figure.get_size_inches()[1] < 1.3 + 1.2 * channels
    require_inside(boxes)
    require_inside(images)
    assert boxes.figure.legends[0].get_title().get_text().startswith("weights of 2 seeds")
    assert draw_utilities({"0.bias": np.full((4, 6), np.nan, np.float32)}, run) == []
