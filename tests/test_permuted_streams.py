"""Streams of single samples with permuted labels or pixels."""

import numpy as np
import pytest

from ntkgen.continual.streaming.bins import Sums, bin_ends
from ntkgen.continual.streams.permuted import STREAMS, PermutedStream, PermutedStreamSettings
from ntkgen.errors import InputError, UnknownNameError

LABELS = np.repeat(np.arange(5), 6)


def stream_of(seed=0, **settings):
    return PermutedStream(PermutedStreamSettings(**{"samples_per_task": 20, **settings}), LABELS, 12, seed)


def listed(stream, start, stop):
    return [
        (part.task, part.start + index, int(sample), int(target))
        for part in stream.segments(start, stop)
        for index, (sample, target) in enumerate(zip(part.ids, stream.targets(part.ids, part.task), strict=True))
    ]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("compounding", [True, False])
def test_a_stream_is_a_function_of_the_seed_and_the_position(stream, compounding):
    settings = {"stream": stream, "compounding": compounding}
    whole = listed(stream_of(**settings), 0, 90)
    assert [position for _, position, _, _ in whole] == list(range(90))
    assert [task for task, _, _, _ in whole] == [position // 20 for position in range(90)]
    assert listed(stream_of(**settings), 37, 90) == whole[37:]  # continued in the middle of a task
    backwards = stream_of(**settings)
    assert listed(backwards, 70, 90) == whole[70:]
    assert listed(backwards, 3, 20) == whole[3:20]
    assert listed(stream_of(seed=1, **settings), 0, 90) != whole


@pytest.mark.parametrize("compounding", [True, False])
def test_targets_are_the_labels_by_other_names(compounding):
    stream = stream_of(compounding=compounding)
    maps = [stream.label_map(task) for task in range(6)]
    assert all(sorted(each.tolist()) == list(range(5)) for each in maps)
    assert len({tuple(each.tolist()) for each in maps}) > 3
    ids = np.arange(30)
    np.testing.assert_array_equal(stream.targets(ids, 4), maps[4][LABELS])
    assert stream.pixel_map(4) is None


def test_compounding_applies_each_permutation_to_the_last():
    drawn = [stream_of(compounding=False).label_map(task) for task in range(3)]
    compounded = [stream_of(compounding=True).label_map(task) for task in range(3)]
    np.testing.assert_array_equal(compounded[0], drawn[0])
    np.testing.assert_array_equal(compounded[2], drawn[2][drawn[1][drawn[0]]])


def test_pixels_can_be_put_back():
    stream = stream_of(stream="input-permuted")
    image = np.arange(12.0)
    pixels = stream.pixel_map(3)
    shown = image[pixels]
    assert shown.tolist() != image.tolist()
    restored = np.empty(12)
    restored[pixels] = shown
    np.testing.assert_array_equal(restored, image)
    np.testing.assert_array_equal(stream.targets(np.arange(30), 3), LABELS)  # labels stay
    both = [stream_of(stream="input-permuted", compounding=each).pixel_map(1) for each in (True, False)]
    np.testing.assert_array_equal(both[0], stream.pixel_map(0)[both[1]])


def test_a_task_sees_each_sample_once_before_it_sees_one_twice():
    (first, second) = stream_of(samples_per_task=45).segments(0, 90)
    for part in (first, second):
        assert sorted(part.ids[:30].tolist()) == list(range(30))
        assert len(set(part.ids[30:].tolist())) == 15
    assert first.ids.tolist() != second.ids.tolist()


def test_published_lengths_of_tasks():
    periods = [PermutedStreamSettings(stream=name).period for name in STREAMS]
    compounding = [PermutedStreamSettings(stream=name).is_compounding for name in STREAMS]
    assert (periods, compounding) == ([2500, 5000], [True, False])


def test_impossible_streams_are_refused():
    with pytest.raises(UnknownNameError, match="label-permuted"):
        PermutedStreamSettings(stream="label-permutted")
    with pytest.raises(InputError, match="samples_per_task"):
        PermutedStreamSettings(samples_per_task=0)


def test_bins_are_whole_tasks_and_use_every_sample():
    assert bin_ends(100, 25) == [25, 50, 75, 100]
    assert bin_ends(101, 25) == [25, 50, 75, 100, 101]
    assert bin_ends(100, 25, "published") == [1, 26, 51, 76]


def test_means_do_not_depend_on_when_blocks_end():
    values = np.random.default_rng(0).lognormal(0, 5, (50, 3))
    means = []
    for cuts in ([], [1, 2, 30], list(range(50))):
        sums = Sums(["loss"], 3)
        for part in np.split(values, cuts):
            sums.add("loss", part)
        means.append(sums.means()["loss"])
        assert np.isnan(sums.means()["loss"]).all()  # a new bin has no samples
    np.testing.assert_allclose(means[0], values.mean(0))
    assert means[0].tobytes() == means[1].tobytes() == means[2].tobytes()
