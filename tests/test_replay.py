"""Memories and replay: what is kept, what each batch has, and that it keeps the accuracy of earlier tasks."""

import numpy as np
import pytest

from ntkgen.continual.configuration import MethodOptions
from ntkgen.continual.memory import Balanced, Reservoir, make_memory
from ntkgen.continual.methods import METHODS, make_method
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.streams.incremental import Split, StreamSettings, make_stream
from ntkgen.errors import InputError, UnknownNameError

LABELS = np.repeat(np.arange(6), 50)
STREAM = make_stream(StreamSettings(Split(2, 2)), LABELS, np.zeros(0, np.int64), 6, seed=0)


def method_of(name, **options):
    return make_method(name, Situation(STREAM, LABELS, 0, MethodOptions(**options)))


@pytest.mark.parametrize("kind", [Reservoir, Balanced])
def test_a_memory_never_exceeds_its_capacity_and_has_no_sample_twice(kind):
    memory, rng = kind(20), np.random.default_rng(0)
    for label in range(6):
        ids = rng.permutation(np.flatnonzero(label == LABELS))
        memory.add(ids, LABELS[ids], rng)
        assert len(set(memory.ids)) == len(memory.ids) <= 20


def test_a_reservoir_keeps_every_sample_equally_often():
    counts = np.zeros(60)
    for seed in range(2000):
        memory = Reservoir(15)
        memory.add(np.arange(60), np.zeros(60), np.random.default_rng(seed))
        counts[memory.ids] += 1
    assert counts.sum() == 2000 * 15
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


def test_a_balanced_memory_has_every_class_equally_often_and_shortens_its_lists():
    memory, rng = Balanced(20), np.random.default_rng(0)
    memory.add(np.arange(100), LABELS[:100], rng)
    first = set(memory.ids)
    assert np.bincount(LABELS[memory.ids]).tolist() == [10, 10]
    memory.add(np.arange(100, 200), LABELS[100:200], rng)
    assert np.bincount(LABELS[memory.ids]).tolist() == [5] * 4
    assert {sample for sample in memory.ids if sample < 100} <= first


@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
def test_a_restored_memory_continues_alike(kind):
    memory, other = make_memory(kind, 20), make_memory(kind, 20)
    memory.add(np.arange(100), LABELS[:100], np.random.default_rng(0))
    other.load_state_dict(memory.state_dict())
    for each in (memory, other):
        each.add(np.arange(100, 300), LABELS[100:300], np.random.default_rng(1))
    assert memory.ids.tolist() == other.ids.tolist()


@pytest.mark.parametrize(
    ("kind", "capacity", "match"), [("reservoir", 0, "keeps nothing"), ("balanced", 1, "too small for 2 classes")]
)
def test_a_memory_that_is_too_small_is_refused(kind, capacity, match):
    with pytest.raises(InputError, match=match):
        make_memory(kind, capacity).add(np.arange(100), LABELS[:100], np.random.default_rng(0))


def test_an_unknown_memory_is_refused():
    with pytest.raises(UnknownNameError, match="reservoir"):
        make_memory("reservor", 3)


def test_replay_doubles_each_batch_once_there_is_a_memory():
    method, task = method_of("replay", buffer=30), STREAM.tasks[1]
    ids = method.epoch_ids(task, 0)[:16]
    assert method.batch_ids(ids, task, 0).tolist() == ids.tolist()
    method.end(STREAM.tasks[0], None)
    batch = method.batch_ids(ids, task, 0)
    assert batch[:16].tolist() == ids.tolist()
    assert set(batch[16:]) <= set(method.memory.ids) <= set(STREAM.tasks[0].train)
    assert len(batch) == 32
    assert batch.tolist() == method.batch_ids(ids, task, 0).tolist() != method.batch_ids(ids, task, 1).tolist()


def test_the_schemes_of_the_predecessor_have_their_counts():
    task = STREAM.tasks[2]
    mixed, two_pass = (method_of(name, replay=25).epoch_ids(task, 3) for name in ("replay-mixed", "replay-two-pass"))
    for ids in (mixed, two_pass):
        assert np.bincount(np.searchsorted([0, 2, 4], LABELS[ids], side="right") - 1).tolist() == [25, 25, 90]
        assert len(set(ids)) == len(ids)
    assert set(two_pass[:90]) == set(task.train)
    assert set(mixed[:90]) != set(task.train)
    assert set(mixed) != set(method_of("replay-mixed", replay=25).epoch_ids(task, 4))


@pytest.mark.parametrize("name", METHODS)
def test_epochs_follow_from_the_seed_and_their_number_alone(name):
    one, other = method_of(name), method_of(name)
    other.epoch_ids(STREAM.tasks[1], 0)
    assert one.epoch_ids(STREAM.tasks[1], 1).tolist() == other.epoch_ids(STREAM.tasks[1], 1).tolist()
