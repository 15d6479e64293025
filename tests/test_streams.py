"""Streams: which samples each task has, under which targets, and that nothing depends on what else is drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkgen.continual.chance import PURPOSES, generator_of, seed_of
from ntkgen.continual.streams.incremental import Split, StreamSettings, make_stream
from ntkgen.continual.streams.order import class_order
from ntkgen.errors import InputError, UnknownNameError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 40))
TEST_LABELS = np.repeat(np.arange(10), 5)


def stream_of(split="2/2", labels=LABELS, seed=0, num_classes=10, **settings):
    return make_stream(StreamSettings(Split.parse(split), **settings), labels, TEST_LABELS, num_classes, seed)


# chance ---------------------------------------------------------------------------------------------------------------


def test_every_purpose_has_a_seed_of_its_own_and_numbers_change_it():
    seeds = {seed_of(seed, purpose) for seed in range(5) for purpose in PURPOSES}
    assert len(seeds) == 5 * len(PURPOSES)
    assert seed_of(0, "split", 1) != seed_of(0, "split", 2)
    assert max(seeds) < 2**63
    assert generator_of(3, "probe").integers(1000) == generator_of(3, "probe").integers(1000)


# orders ---------------------------------------------------------------------------------------------------------------


def test_the_order_of_icarl_is_that_of_its_authors():
    expected = np.arange(100)
    np.random.RandomState(1993).shuffle(expected)
    assert class_order("icarl", 100, seed=5) == tuple(expected.tolist())
    assert class_order("icarl", 100, seed=5)[:5] == (68, 56, 78, 8, 23)  # as published with the method


def test_a_random_order_follows_the_seed():
    assert class_order("random", 10, 0) == class_order("random", 10, 0) != class_order("random", 10, 1)
    assert sorted(class_order("random", 10, 0)) == list(range(10))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3]])
def test_an_order_that_lacks_a_class_is_refused(order):
    with pytest.raises(InputError, match="each of the classes 0 to 2 once"):
        class_order(order, 3, 0)


def test_an_unknown_order_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean natural"):
        class_order("naturall", 3, 0)


# disjoint classes -----------------------------------------------------------------------------------------------------


def test_tasks_are_disjoint_and_complete():
    stream = stream_of(order=(3, 1, 4, 0, 5, 9, 2, 6, 8, 7))
    assert [task.classes for task in stream.tasks] == [(3, 1), (4, 0), (5, 9), (2, 6), (8, 7)]
    everything = np.concatenate([np.concatenate([task.train, task.validation]) for task in stream.tasks])
    assert sorted(everything) == list(range(400))
    for task in stream.tasks:
        assert (
            set(LABELS[task.train]) == set(LABELS[task.validation]) == set(TEST_LABELS[task.test]) == set(task.classes)
        )
        assert (len(task.train), len(task.validation), len(task.test)) == (72, 8, 10)
        assert [int((LABELS[task.validation] == label).sum()) for label in task.classes] == [4, 4]


def test_targets_are_dense_in_the_order_of_the_stream():
    stream = stream_of(order=(3, 1, 4, 0, 5, 9, 2, 6, 8, 7))
    assert stream.targets(np.array([3, 1, 4, 7])).tolist() == [0, 1, 2, 9]
    assert stream.task_targets(2) == (4, 5)
    assert [stream.num_seen(task) for task in range(5)] == [2, 4, 6, 8, 10]


def test_an_uneven_last_task():
    assert [len(task.classes) for task in stream_of("4/4").tasks] == [4, 4, 2]
    assert [len(task.classes) for task in stream_of("10/3").tasks] == [10]
    assert [len(task.classes) for task in stream_of("2/2", num_tasks=3).tasks] == [2, 2, 2]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 60))
def test_the_sizes_of_a_split_add_up(initial, increment, num_classes):
    try:
        sizes = Split(initial, increment).sizes(num_classes)
    except InputError:
        assert initial > num_classes or increment > num_classes - initial > 0
        return
    assert sum(sizes) == num_classes
    assert sizes[0] == initial
    assert set(sizes[1:-1]) <= {increment}
    assert 0 < sizes[-1] <= max(initial, increment)


@pytest.mark.parametrize("text", ["2", "0/2", "2/0", "a/b", "2/2/2", "-1/2", ""])
def test_what_is_no_split_is_refused(text):
    with pytest.raises(InputError, match="no split of classes"):
        Split.parse(text)


@pytest.mark.parametrize("text", ["11/1", "2/9"])
def test_a_split_larger_than_the_classes_is_refused(text):
    with pytest.raises(InputError, match="does not fit 10 classes"):
        stream_of(text)


def test_more_tasks_than_the_split_gives_are_refused():
    with pytest.raises(InputError, match="6 tasks were asked for"):
        stream_of(num_tasks=6)


def test_a_class_without_samples_is_refused():
    with pytest.raises(InputError, match="no training samples of class 10"):
        stream_of("2/3", num_classes=11)


def test_the_split_of_the_predecessor():
    stream = stream_of(compatible_split=True)
    members = np.flatnonzero((LABELS == 2) | (LABELS == 3))
    indexes = np.arange(80)
    np.random.RandomState(1).shuffle(indexes)
    assert stream.tasks[1].validation.tolist() == members[indexes[:8]].tolist()
    assert stream.tasks[1].train.tolist() == members[indexes[8:]].tolist()


def test_a_seed_changes_the_split_and_not_the_natural_order():
    one, same, other = stream_of(seed=1), stream_of(seed=1), stream_of(seed=2)
    assert one.tasks[0].validation.tolist() == same.tasks[0].validation.tolist() != other.tasks[0].validation.tolist()
    assert one.order == other.order
    assert one.tasks[0].test.tolist() == other.tasks[0].test.tolist()


# shifts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "shared"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_overlapping_classes(overlap, shared):
    first, second = stream_of("4/4", overlap=overlap, num_tasks=2).tasks
    assert len(first.classes) == len(second.classes) == 4
    assert len(set(first.classes) & set(second.classes)) == shared
    assert not set(first.validation) & set(second.train)
    assert not set(first.train) & set(second.validation)


def test_complete_overlap_repeats_the_first_task():
    stream = stream_of("4/4", overlap=1.0, num_tasks=3)
    assert stream.tasks[0].train.tolist() == stream.tasks[2].train.tolist()
    assert stream.num_targets == 4
    assert len(stream_of("4/4", overlap=1.0)) == 2


def test_overlapping_tasks_need_fewer_classes():
    tasks = stream_of("4/4", overlap=0.5).tasks
    assert [task.classes for task in tasks] == [(0, 1, 2, 3), (0, 1, 4, 5), (0, 1, 6, 7), (0, 1, 8, 9)]


def proportions(task):
    return np.bincount(LABELS[task.train], minlength=10) / len(task.train)


def test_a_frequency_shift_changes_proportions_alone():
    none, half, whole = (stream_of(frequency_shift=alpha).tasks for alpha in (0.0, 0.5, 1.0))
    assert all(set(LABELS[task.train]) == set(range(10)) for tasks in (none, half, whole) for task in tasks)
    assert np.abs(proportions(none[0]) - proportions(none[1])).max() < 0.03
    assert np.abs(proportions(whole[0]) - proportions(whole[1])[::-1]).max() < 0.03
    assert proportions(whole[0])[:5].sum() == pytest.approx(0.8, abs=0.05)
    assert proportions(half[1])[:5].sum() == pytest.approx(0.5, abs=0.05)
    assert len(none[0].train) == pytest.approx(len(whole[1].train), abs=10)


def test_a_gradual_switch_fades_the_last_task_out():
    stream = stream_of(blend_steps=3)
    assert [stream.old_fraction(step) for step in range(5)] == [0.75, 0.5, 0.25, 0, 0]
    assert stream_of().old_fraction(0) == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"overlap": 1.5}, "`overlap` is 1.5: expected a fraction from 0 to 1. Is a percentage given"),
        ({"overlap": float("nan")}, "`overlap` is nan"),
        ({"frequency_shift": -0.1}, "`frequency_shift` is -0.1: expected a fraction from 0 to 1. Is the sign wrong"),
        ({"blend_steps": -1}, "`blend_steps` is -1: expected 0 or more iterations. Is the sign wrong"),
        ({"num_tasks": 0}, "`num_tasks` is 0: expected 1 or more. Are all tasks"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, match):
    with pytest.raises(InputError, match=match):
        stream_of(**settings)


def test_two_kinds_of_shift_are_refused():
    with pytest.raises(InputError, match="both were asked for"):
        stream_of(overlap=0.5, frequency_shift=0.5)


def test_a_stream_is_described_in_plain_values():
    assert stream_of().describe()[1] == {"task": 1, "classes": [2, 3], "train": 72, "validation": 8, "test": 10}
