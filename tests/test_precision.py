"""Policies, and the switches of the process: exact inside, as they were outside."""

import json
import subprocess
import sys

import pytest
import torch
from cases import CPU

from ntkgen.errors import UnknownNameError
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_found_by_its_name(name):
    found = policy(name)
    assert found.name == name == str(found.compute_dtype).removeprefix("torch.")
    assert found.accumulate_dtype.itemsize >= found.compute_dtype.itemsize


def test_an_unknown_precision_names_the_close_ones():
    with pytest.raises(UnknownNameError, match=r"^Unknown precision 'float46'\. Did you mean float64.*Known: [^\n]*$"):
        policy("float46")


def switches():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "flushed": bool(torch.tensor([1e-38]).mul(0.1) == 0),
    }


EXACT = {
    "grad": True,
    "inference": False,
    "autocast": False,
    "threads": 3,
    "cudnn": (True, False, True),
    "flushed": True,  # a number below the smallest normal one takes a CPU a hundred times longer
}


def reduced_precision():
    """The switches of float32 products by their older names, which torch refuses to read inside."""
    tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return torch.get_float32_matmul_precision(), tf32


@pytest.fixture
def medium():
    """Allow TF32 and bfloat16 inside float32 products, for one test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


MODES = {
    "as it is": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_exact_inside_and_as_it_was_outside(mode, medium):
    with MODES[mode]():
        before = (switches(), reduced_precision())
        with exact_arithmetic(CPU, threads=3):
            assert switches() == EXACT
        assert (switches(), reduced_precision()) == before
    assert before[1] == ("medium", (True, True))


def test_everything_is_as_it_was_after_an_error(medium):
    before = (switches(), reduced_precision())
    with pytest.raises(ZeroDivisionError), torch.no_grad(), exact_arithmetic(CPU, threads=3):
        _ = 1 / 0
    assert (switches(), reduced_precision()) == before


@pytest.mark.parametrize("flushed", [True, False])
def test_denormal_numbers_are_treated_as_before(flushed):
    torch.set_flush_denormal(flushed)
    try:
        with exact_arithmetic(CPU):
            assert switches()["flushed"]
        assert switches()["flushed"] == flushed
    finally:
        torch.set_flush_denormal(False)


def test_threads_are_left_alone_unless_asked_for():
    before = torch.get_num_threads()
    with exact_arithmetic(CPU):
        assert torch.get_num_threads() == before


# Every switch is set in a process of its own: some of them cannot be set back.
EVERY_SWITCH = """
import json, os, sys, torch
from ntkgen.jacobian.precision import exact_arithmetic

backends = torch.backends
places = {
    "all": backends, "cuda.matmul": backends.cuda.matmul, "cudnn": backends.cudnn, "cudnn.conv": backends.cudnn.conv,
    "cudnn.rnn": backends.cudnn.rnn, "mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv,
    "mkldnn.rnn": backends.mkldnn.rnn,
}

def state():
    return {name: place.fp32_precision for name, place in places.items()}

def apart(function):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = function()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 1 << 16))

def around(name, value):
    places[name].fp32_precision = value
    before = state()
    with exact_arithmetic(torch.device("cpu")):
        inside = state()
    return before, inside, state()

def later(name, value, ours):
    found = []
    for place, chosen in ((name, value), ("all", "ieee"), ("all", "tf32")):
        if ours:
            with exact_arithmetic(torch.device("cpu")):
                pass
        places[place].fp32_precision = chosen
        found.append(state())
    return found

report = {}
for name in places:
    for value in ("ieee", "tf32"):
        report[f"{name} {value}"] = {
            "around": apart(lambda: around(name, value)),
            "later": [apart(lambda: later(name, value, ours)) for ours in (False, True)],
        }
print(json.dumps(report))
"""

PLACES = ["all", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
SETTINGS = [f"{place} {value}" for place in PLACES for value in ("ieee", "tf32")]


@pytest.fixture(scope="module")
def report():
    done = subprocess.run([sys.executable, "-c", EVERY_SWITCH], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_products_are_ieee_whatever_the_user_has_chosen(report, setting):
    around = report[setting]["around"]
    assert isinstance(around, list), around  # otherwise the error that torch raised
    before, inside, after = around
    assert {value for place, value in inside.items() if place.startswith("mkldnn.")} <= {"ieee", "none"}
    assert after == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_user_chooses_later_means_what_it_would_have_meant(report, setting):
    without, with_ours = report[setting]["later"]
    assert with_ours == without
