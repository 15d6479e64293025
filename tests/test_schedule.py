"""Schedules: at which moments of training a run looks."""

import pytest

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.schedule import Moment, Schedule
from ntkgen.errors import InputError


def steps(schedule, steps_per_epoch=4, num_epochs=3):
    last = steps_per_epoch * num_epochs
    return [step for step in range(last + 1) if schedule.contains(Moment(1, step, steps_per_epoch, last))]


@pytest.mark.parametrize(
    ("text", "dense", "expected"),
    [
        ("task", None, [12]),
        ("1ep", None, [4, 8, 12]),
        ("2ep", None, [8, 12]),
        ("5it", None, [0, 5, 10, 12]),
        ("12it", None, [0, 12]),
        ("task", 4, [0, 1, 2, 4, 12]),
        ("1ep", 7, [0, 1, 2, 4, 8, 12]),
        ("1ep", 0, [0, 4, 8, 12]),
    ],
)
def test_moments(text, dense, expected):
    schedule = Schedule.parse(text, dense)
    assert steps(schedule) == expected
    assert schedule.count(4, 3) == len(expected)
    assert str(schedule) == text


@pytest.mark.parametrize("text", ["never", "0it", "ep", "1", "-1ep", "1.5ep", "10 it", "1epoch"])
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(InputError, match="no schedule"):
        Schedule.parse(text)


@pytest.mark.parametrize("evaluations", ["task", "1ep", "2it"])
def test_a_run_is_evaluated_once_before_its_training(evaluations):
    schedule = RunSettings(evaluations=evaluations).evaluation_schedule
    assert schedule.contains(Moment(0, 0, 4, 12))
    counts = [schedule.count(4, 3, is_first=is_first) for is_first in (True, False)]
    assert counts[0] == counts[1] + 1
    assert counts[1] == {"task": 1, "1ep": 3, "2it": 6}[evaluations]
