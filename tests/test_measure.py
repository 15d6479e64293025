"""The rates of a device: measured once, remembered whole, measured again where what is remembered is damaged."""

import dataclasses
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CPU, chosen

import ntkgen
from ntkgen.jacobian import dense, measure
from ntkgen.jacobian.cost import Rates
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.precision import POLICIES, policy
from ntkgen.jacobian.products import routes

FOUND = Rates("mm", 1, 2, 3, 4, 5)


@pytest.fixture
def measured(monkeypatch):
    """Measurements that take no time, counted; and nothing remembered in this process."""
    calls = []

    def count(device, precision):
        calls.append((device, precision.name))
        return dataclasses.replace(FOUND, touching=len(calls))

    monkeypatch.delenv("NTKGEN_RATES")
    monkeypatch.setattr(measure, "measure", count)
    rates_of.cache_clear()
    yield calls
    rates_of.cache_clear()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ntkgen" / "rates.json"


def look_up(precision="float32"):
    """Look the rates up as another process would."""
    rates_of.cache_clear()
    return rates_of(CPU, precision)


# what is remembered ---------------------------------------------------------------------------------------------------


def test_rates_are_measured_once_and_then_read(measured, file):
    assert look_up() == look_up() == dataclasses.replace(FOUND, touching=1)
    assert measured == [(CPU, "float32")]
    (key,) = json.loads(file.read_text())
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32" in key


def test_a_process_reads_the_file_once(measured, file):
    first = look_up()
    file.unlink()
    assert rates_of(CPU, "float32") == first
    assert len(measured) == 1


def test_every_precision_and_number_of_threads_has_rates_of_its_own(measured, file):
    before = torch.get_num_threads()
    look_up("float32"), look_up("float64")
    torch.set_num_threads(before + 1)
    try:
        look_up("float32")
    finally:
        torch.set_num_threads(before)
    assert len(measured) == len(json.loads(file.read_text())) == 3
    assert look_up("float32").touching == 1
    assert look_up("float64").touching == 2


def test_what_others_have_written_stays(measured, file):
    file.parent.mkdir()
    other = {"another machine": dataclasses.asdict(FOUND)}
    file.write_text(json.dumps(other))
    look_up()
    assert other.items() < json.loads(file.read_text()).items()


DAMAGE = {
    "empty": "",
    "half": '{"cpu AVX512',
    "no json": "measured on Tuesday",
    "bytes": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "7",
    "values that are none": '{"KEY": 7}',
    "a list of names": '{"KEY": ["route", "product", "building", "carrying", "finishing", "touching"]}',
    "rates of another version": '{"KEY": {"product": 1, "speed": 2}}',
    "a rate too few": '{"KEY": {"route": "mm", "product": 1, "building": 2, "carrying": 3, "finishing": 4}}',
    "a rate that is no number": json.dumps({"KEY": {**dataclasses.asdict(FOUND), "product": "fast"}}),
    "a rate of zero": json.dumps({"KEY": {**dataclasses.asdict(FOUND), "product": 0}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_anew_and_repaired(damage, measured, file):
    look_up()
    (key,) = json.loads(file.read_text())
    broken = DAMAGE[damage]
    file.write_bytes(broken if isinstance(broken, bytes) else broken.replace("KEY", key).encode())
    assert look_up() == dataclasses.replace(FOUND, touching=2)
    assert look_up().touching == 2
    assert len(measured) == 2


@pytest.mark.parametrize("what", ["the file", "its folder"])
def test_where_nothing_can_be_written_it_is_measured_every_time(what, measured, file):
    blocked = file if what == "the file" else file.parent
    blocked.parent.mkdir(exist_ok=True)
    if what == "the file":
        blocked.mkdir()  # a folder where the file should be
    else:
        blocked.touch()  # and a file where the folder should be
    assert look_up().touching == 1
    assert look_up().touching == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not stop this user")
def test_a_folder_that_is_read_only_is_left_alone(measured, file, tmp_path):
    file.parent.mkdir()
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert look_up().touching == 1
        assert look_up().touching == 2
    finally:
        file.parent.chmod(stat.S_IRWXU)
    assert list(file.parent.iterdir()) == []


def test_the_file_is_written_whole_or_not_at_all(measured, file, monkeypatch):
    look_up("float32")
    whole = file.read_text()
    seen, replace = [], os.replace

    def watched(source, target, **options):
        assert str(target) == str(file)
        assert file.read_text() == whole  # what is there is there until it is replaced
        assert len(json.loads(Path(source).read_text())) == 2
        seen.append(source)
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", watched)
    look_up("float64")
    monkeypatch.setattr(os, "replace", replace)
    assert seen
    assert file.read_text() == whole
    look_up("float64")
    assert len(json.loads(file.read_text())) == 2
    assert [path.name for path in file.parent.iterdir()] == ["rates.json"]


def test_it_is_kept_in_the_home_where_no_other_place_is_named(measured, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    look_up()
    assert (tmp_path / ".cache" / "ntkgen" / "rates.json").exists()


def test_a_user_without_a_home_measures_each_time(measured, monkeypatch):
    def unknown(*_):
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert look_up() == dataclasses.replace(FOUND, touching=1)
    assert look_up() == dataclasses.replace(FOUND, touching=2)


# without a measurement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", POLICIES)
def test_the_default_rates_are_neither_measured_nor_written(precision, measured, file, monkeypatch):
    monkeypatch.setenv("NTKGEN_RATES", "default")
    assert look_up(precision) == Rates()
    assert measured == []
    assert not file.exists()


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_default_rates_from_its_surroundings(tmp_path):
    script = (
        "import torch\n"
        "from ntkgen.jacobian.measure import rates_of\n"
        "from ntkgen.jacobian.cost import Rates\n"
        "assert rates_of(torch.device('cpu'), 'float32') == Rates()"
    )
    surroundings = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=surroundings)
    assert list(tmp_path.iterdir()) == []


# the measurement itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision", chosen(["float32", "float64", "float64-accumulate", "bfloat16"], ["float32", "bfloat16"])
)
def test_a_measurement_gives_rates_of_one_digit_and_a_route_that_works(precision, monkeypatch):
    monkeypatch.setattr(measure, "TRIALS", 1)
    before = torch.get_rng_state()
    found = measure.measure(CPU, policy(precision))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.route in routes(CPU)
    speeds = [value for name, value in dataclasses.asdict(found).items() if name != "route"]
    assert all(isinstance(value, int) and value > 0 for value in speeds)
    assert all(set(str(value)[1:]) <= {"0"} for value in speeds)


def test_plans_go_by_the_rates_that_were_found(measured, file, monkeypatch):
    monkeypatch.setattr(dense, "JOINT_NUMBERS", 0)  # small networks are planned by their sizes alone
    model, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
    assert dense.plan_ntk(model, x, asked=dense.Request(precision="float64")).jacobian.rates == dataclasses.replace(
        FOUND, touching=1
    )
    assert measured == [(CPU, "float64")]
    assert torch.equal(ntkgen.ntk(model, x, precision="float64").diagonal(), torch.full((6,), 5.0).double())
