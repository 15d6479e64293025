"""The scheduler without a cluster and without a clock: what it assigns, tries again and gives up."""

import subprocess
import sys

import pytest

from ntkgen.engine.jobs import Job
from ntkgen.engine.scheduler import (
    MAX_ATTEMPTS,
    MAX_ERRORS,
    NO_WORKER_SECONDS,
    RESTART_SECONDS,
    STALLED_RATIO,
    STALLED_SECONDS,
    Scheduler,
    SchedulerSettings,
    Withdrawal,
)
from ntkgen.errors import WorkerError


def jobs(number, size=1):
    return [Job(indices=tuple(range(at * size, (at + 1) * size))) for at in range(number)]


def scheduler_of(number, workers=("a", "b"), *, size=1, **settings):
    """A scheduler that has seen some workers at time 0."""
    scheduler = Scheduler(jobs(number, size), SchedulerSettings(**settings), now=0.0)
    scheduler.observe(workers, 0.0)
    return scheduler


def assigned(scheduler, now=0.0):
    return {pending.worker: pending.job.indices[0] for pending in scheduler.assign(now)}


# one job per worker at a time -----------------------------------------------------------------------------------------


def test_each_worker_has_one_job_at_a_time():
    scheduler = scheduler_of(3)
    assert assigned(scheduler) == {"a": 0, "b": 1}
    assert assigned(scheduler) == {}
    assert scheduler.finish("b", 1.0) == 1
    assert assigned(scheduler) == {"b": 2}
    assert set(scheduler.pending) == {"a", "b"}
    scheduler.finish("a", 1.0)
    assert not scheduler.is_finished
    scheduler.finish("b", 1.0)
    assert scheduler.is_finished


def test_no_more_jobs_are_assigned_than_there_are():
    assert assigned(scheduler_of(1, ("c", "a", "b"))) == {"a": 0}


def test_nothing_to_do_is_finished():
    scheduler = scheduler_of(0)
    assert scheduler.is_finished
    assert scheduler.assign(0.0) == []


# workers that join, leave and are killed ------------------------------------------------------------------------------


def test_a_worker_that_comes_later_gets_a_job():
    scheduler = scheduler_of(3, ("a",))
    assert assigned(scheduler) == {"a": 0}
    scheduler.observe({"a", "b"}, 1.0)
    assert assigned(scheduler, 1.0) == {"b": 1}


def test_the_job_of_a_worker_that_has_gone_is_done_next_by_another():
    scheduler = scheduler_of(4)
    assigned(scheduler)
    scheduler.observe({"b"}, 1.0)
    assert scheduler.withdraw(1.0) == [Withdrawal("a", has_stalled=False)]
    scheduler.finish("b", 1.0)
    assert assigned(scheduler, 1.0) == {"b": 0}
    scheduler.finish("b", 1.0)
    assert assigned(scheduler, 1.0) == {"b": 2}


def test_a_worker_that_has_gone_and_comes_back_gets_jobs_again():
    scheduler = scheduler_of(1, ("a",))
    assigned(scheduler)
    scheduler.observe(set(), 1.0)
    scheduler.withdraw(1.0)
    assert assigned(scheduler, 1.0) == {}
    scheduler.observe({"a"}, 2.0)
    assert assigned(scheduler, 2.0) == {"a": 0}


def test_an_outcome_that_is_lost_with_its_worker_is_computed_again():
    scheduler = scheduler_of(2)
    assigned(scheduler)
    scheduler.lose("a")
    assert assigned(scheduler) == {"a": 0}


def test_a_job_whose_workers_die_each_time_ends_the_run():
    scheduler = scheduler_of(2, ("a",), size=4)
    for attempt in range(MAX_ATTEMPTS - 1):
        scheduler.observe({f"w{attempt}"}, 0.0)
        assert assigned(scheduler) == {f"w{attempt}": 0}
        scheduler.observe(set(), 0.0)
        scheduler.withdraw(0.0)
    scheduler.observe({"last"}, 0.0)
    assigned(scheduler)
    scheduler.observe(set(), 0.0)
    with pytest.raises(WorkerError, match=f"A job of 4 tiles was lost or stalled {MAX_ATTEMPTS} times"):
        scheduler.withdraw(0.0)


# errors ---------------------------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_tried_again_first():
    scheduler = scheduler_of(3, ("a",))
    assigned(scheduler)
    scheduler.fail("a", RuntimeError("cosmic rays"))
    assert assigned(scheduler) == {"a": 0}


def test_an_error_that_comes_again_and_again_ends_the_run():
    scheduler, error = scheduler_of(1, ("a",)), RuntimeError("cosmic rays")
    for _ in range(MAX_ERRORS - 1):
        assigned(scheduler)
        scheduler.fail("a", error)
    assigned(scheduler)
    with pytest.raises(WorkerError, match=f"failed {MAX_ERRORS} times .RuntimeError: cosmic rays.") as raised:
        scheduler.fail("a", error)
    assert raised.value.__cause__ is error


def test_errors_and_losses_are_counted_apart_and_per_job():
    scheduler = scheduler_of(2)
    for _ in range(MAX_ERRORS - 1):
        assert assigned(scheduler) == {"a": 0, "b": 1}
        scheduler.fail("b", ValueError())
        scheduler.fail("a", ValueError())
    assert assigned(scheduler) == {"a": 0, "b": 1}
    scheduler.lose("b")
    scheduler.lose("a")
    assert assigned(scheduler) == {"a": 0, "b": 1}


# jobs that stall ------------------------------------------------------------------------------------------------------


def test_a_job_that_stalls_is_done_by_another_worker_and_its_worker_gets_none():
    scheduler = scheduler_of(2, ("a",), tile_seconds=5.0)
    assigned(scheduler)
    assert scheduler.withdraw(5.0) == []
    assert scheduler.withdraw(5.1) == [Withdrawal("a", has_stalled=True)]
    scheduler.observe({"a"}, 6.0)
    assert assigned(scheduler, 6.0) == {}
    scheduler.observe({"a", "b"}, 7.0)
    assert assigned(scheduler, 7.0) == {"b": 0}
    assert scheduler.withdraw(12.0) == []  # the count begins again


@pytest.mark.parametrize(
    ("settings", "size", "limit"),
    [
        ({}, 2, STALLED_SECONDS),
        ({"projected_seconds": 1.0}, 2, STALLED_SECONDS),
        ({"projected_seconds": 100.0}, 2, STALLED_RATIO * 200),
        ({"projected_seconds": 100.0, "tile_seconds": 400.0}, 2, 800.0),
        ({"projected_seconds": 1.0, "tile_seconds": 600.0}, 3, 1800.0),
    ],
)
def test_a_job_is_stalled_after_many_times_its_projected_duration(settings, size, limit):
    scheduler = scheduler_of(1, ("a",), size=size, **settings)
    scheduler.assign(10.0)
    assert scheduler.withdraw(10.0 + limit) == []
    assert scheduler.withdraw(10.1 + limit) == [Withdrawal("a", has_stalled=True)]


def test_the_slowest_tile_so_far_decides_too():
    scheduler = scheduler_of(2, ("a",), size=2, projected_seconds=1.0)
    scheduler.assign(0.0)
    scheduler.finish("a", 200.0)  # 100 seconds a tile
    scheduler.assign(0.0)
    assert scheduler.withdraw(STALLED_RATIO * 200) == []
    assert scheduler.withdraw(STALLED_RATIO * 200 + 1) != []


# no worker ------------------------------------------------------------------------------------------------------------


def test_workers_of_our_own_that_do_not_come_back_end_the_run():
    scheduler = scheduler_of(1, num_own=2)
    scheduler.observe({"a"}, 100.0)
    scheduler.observe(set(), 100.0 + NO_WORKER_SECONDS)
    with pytest.raises(WorkerError, match="None of the 2 workers is left"):
        scheduler.observe(set(), 100.1 + NO_WORKER_SECONDS)


def test_a_worker_that_has_stalled_counts_as_none():
    scheduler = scheduler_of(1, ("a",), num_own=1, tile_seconds=1.0)
    scheduler.assign(0.0)
    scheduler.withdraw(2.0)
    with pytest.raises(WorkerError, match="None of the 1 workers is left"):
        scheduler.observe({"a"}, NO_WORKER_SECONDS + 1)


def test_workers_of_a_queue_may_take_as_long_as_they_need():
    scheduler = scheduler_of(1, ())
    assert scheduler.observe(set(), 1e6) is False
    scheduler.observe({"a"}, 1e6)
    assert assigned(scheduler, 1e6) == {"a": 0}


def test_missing_workers_of_our_own_are_started_again_from_time_to_time():
    scheduler = scheduler_of(1, num_own=2)
    assert not scheduler.observe({"a"}, RESTART_SECONDS)
    assert scheduler.observe({"a"}, RESTART_SECONDS + 1)
    assert not scheduler.observe({"a"}, RESTART_SECONDS + 2)
    assert scheduler.observe({"a"}, 2 * RESTART_SECONDS + 2)
    assert not scheduler.observe({"a", "b"}, 10 * RESTART_SECONDS)


def test_the_scheduler_loads_neither_torch_nor_dask():
    code = "import sys, ntkgen.engine.scheduler; print({'torch', 'dask', 'distributed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
