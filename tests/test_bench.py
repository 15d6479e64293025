"""The benchmark scripts, on small networks. Only the arithmetic is tested."""

import doctest
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TOLERANCES, relative_error

import ntkgen
from ntkgen.blocks import Block
from ntkgen.jacobian import dense
from ntkgen.jacobian.evaluation import evaluation_copy
from ntkgen.jacobian.reference import jacobian_rows, reference_ntk
from ntkgen.training import zoo

SCRIPTS = Path(__file__).parent.parent / "scripts" / "bench"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make the scripts importable, and their matrix products and measured rates cheap."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("NTKGEN_RATES", "default")
    monkeypatch.setattr(importlib.import_module("machine"), "PEAK_SIDE", {"cpu": 32})


@pytest.fixture
def run(capsys):
    def run_script(name, *args):
        try:
            importlib.import_module(name).main(args, standalone_mode=False)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    return run_script


@pytest.fixture
def baseline():
    return importlib.import_module("full_jacobian")


ENGINE = ["--device", "cpu", "--models", "lenet", "--n", "5", "--block", "2", "--trials", "2"]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_numbers_of_a_comparison_fit_each_other(run, precision):
    code, captured = run("engine", *ENGINE, "--precision", precision, "--json")
    assert code == 0
    found = json.loads(captured.out)
    assert found["relative_error"] <= TOLERANCES[precision]
    assert found["relative_difference"] <= TOLERANCES[precision]
    assert (found["baseline_scaled_from_pairs"], found["of"]) == (2, 6)
    assert (found["baseline_jacobian_samples"], found["baseline_sample_pairs"]) == (5 + 2 + 2 + 2 + 3, 17)
    assert found["baseline_dtype"] == precision
    assert len(found["seconds_all"]) == len(found["baseline_seconds_all"]) == found["trials"] == 2
    assert min(found["seconds_all"]) <= found["seconds"] <= max(found["seconds_all"])
    assert found["spread"] == max(found["seconds_all"]) / min(found["seconds_all"])
    assert found["ratio"] == found["baseline_seconds"] / found["seconds"]
    assert found["peak_flops"] == max(found["mm_flops"], found["route_flops"])
    num_params = sum(param.numel() for param in zoo.build("lenet", 10, seed=0).parameters())
    assert found["explicit_flops"] == 50**2 * num_params
    assert 0 < found["minimal_flops"] <= found["executed_flops"]
    assert found["executed_flops_per_second"] == pytest.approx(found["executed_flops"] / found["seconds"])
    least = found["minimal_flops"] / found["peak_flops"]
    assert found["wall_over_minimal"] == pytest.approx(found["seconds"] / least)


def test_the_table_says_what_the_baseline_is_scaled_from(run):
    code, captured = run("engine", *ENGINE, "--models", "logistic", "--trials", "1", "--pairs", "1")
    assert code == 0
    assert "lenet" in captured.out
    assert "logistic" in captured.out
    assert "1 of 6" in captured.out
    assert "trial 1 of 1" in captured.err


@pytest.mark.parametrize(
    ("script", "args", "expected"),
    [
        ("engine", ["--device", "cpu", "--models", "vgg11", "lent"], "Did you mean lenet or"),
        ("engine", ["--device", "cpu", "--precision", "tf32"], "cuda"),
        ("engine", ["--precision", "float8"], "Unknown precision"),
        ("gpu", ["--device", "cpu", "--models", "lenet", "--tile", "15"], "--tile 20"),
        ("networks", ["--rows", "mlp", "rnn-bear"], "Did you mean rnn-bare"),
    ],
)
def test_a_mistake_is_one_line(run, script, args, expected):
    code, captured = run(script, *args)
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_the_whole_baseline_is_the_kernel(baseline):
    model, x = zoo.build("lenet", 10, seed=0), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    method = baseline.FullJacobian(evaluation_copy(model, torch.float64), chunk_samples=2)
    schedule = baseline.make_schedule(5, 2, None, seed=0)
    measured = baseline.measure(method, x, schedule)
    exact = ntkgen.reference_ntk(model, x)
    assert [relative_error(part, exact[i.rows(10), j.rows(10)]) for (i, j), part in zip(
        schedule.pairs, measured.parts, strict=True
    )] == pytest.approx([0] * 6, abs=TOLERANCES["float64"])  # fmt: skip
    assert measured.jacobian_samples == schedule.jacobian_samples
    assert measured.scaled(schedule) == pytest.approx(measured.jacobian_seconds + measured.product_seconds)


@pytest.mark.parametrize(("samples", "block", "count"), [(128, 16, 2), (5, 2, 2), (9, 2, 4), (4, 2, 7), (3, 4, 2)])
def test_pairs_are_drawn_beside_the_diagonal(baseline, samples, block, count):
    schedule = baseline.make_schedule(samples, block, count, seed=1)
    blocks = Block(0, samples).pieces(block)
    beside = [(row, column) for row in blocks for column in blocks if row < column]
    assert len(set(schedule.pairs)) == min(count, len(beside) or 1)
    assert set(schedule.pairs) <= set(beside or [(blocks[0], blocks[0])])
    assert list(schedule.pairs) == sorted(schedule.pairs)
    if count < len(blocks):
        assert len({row for row, _ in schedule.pairs}) == 1
    assert schedule == baseline.make_schedule(samples, block, count, seed=1)


def test_a_baseline_that_fits_nowhere_says_so(baseline):
    assert baseline.largest_block(16, sample_bytes=1, free_bytes=10**6) == 16
    with pytest.raises(ntkgen.errors.BudgetError, match="two samples"):
        baseline.largest_block(16, sample_bytes=100, free_bytes=200)


def test_doctests(baseline):
    assert doctest.testmod(baseline).failed == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_tile_rate_needs_a_cuda_device(run):
    code, captured = run("gpu")
    assert code == 2
    assert captured.err.startswith("Error: There is no CUDA device here")
    assert captured.err.count("\n") == 1


def test_the_extrapolated_hours_add_up(run):
    small_kernel = ["--device", "cpu", "--models", "lenet", "--n", "25", "--tile", "40", "--trials", "1"]
    code, captured = run("gpu", *small_kernel, "--json")
    assert code == 0
    found = json.loads(captured.out)
    assert found["hours"] == pytest.approx(found["factor_hours"] + found["diagonal_hours"] + found["product_hours"])
    assert found["factor_hours"] == found["factor_seconds_per_sample"] * found["factor_samples"] / 3600
    assert found["factor_samples"] >= found["n"] == 25
    assert found["block_samples"] == 4
    share = found["all_products_flops"] / found["product_flops"]
    assert 15 < share <= 28  # of 28 tiles, 7 are on the diagonal and 6 others ragged
    assert found["product_hours"] == pytest.approx(share * found["product_seconds"] / 3600)
    assert found["published_hours"] == {}
    assert found["ratio"] is None


def test_published_hours_are_compared_in_kind():
    script = importlib.import_module("gpu")
    result = {"model": "resnet18", "n": 50_000, "width": None, "precision": "float32", "hours": 6.3}
    assert script.compare_with_published(result)["ratio"] == pytest.approx(10)
    assert script.compare_with_published({**result, "precision": "bfloat16"})["ratio"] == pytest.approx(14 / 6.3)
    assert script.compare_with_published({**result, "width": 16})["ratio"] is None
    assert set(script.COMPARED_WITH) == set(sys.modules["ntkgen.jacobian.precision"].POLICIES)


@pytest.mark.slow
def test_questions_to_a_kernel_are_timed_and_compared_with_what_is_known(run, monkeypatch):
    bench = importlib.import_module("analysis")
    monkeypatch.setattr(bench, "PRODUCT_SIDE", 64)
    assert bench.product_gflops() > 0
    monkeypatch.setattr(bench, "product_gflops", lambda: 2.0)
    code, printed = run("analysis", "--rows", "305", "--trials", "1", "--json", "--memory", "1GB")
    assert code == 0
    results = {found["question"]: found for found in map(json.loads, printed.out.splitlines())}
    assert set(results) == {"spectrum", "density", "logdet"}
    assert all(found["rows"] == 300 and found["peak_bytes"] > 0 for found in results.values())
    assert max(results["spectrum"]["error"], results["logdet"]["error"]) < 1e-6
    assert results["logdet"]["ratio"] == results["logdet"]["gflops"] / results["logdet"]["product_gflops"]
    assert [bench.line(found).split()[0] for found in results.values()] == list(results)


def test_ways_to_multiply_are_timed_in_turns_and_give_the_same_determinant(run):
    args = ["--rows", "600", "--sides", "8", "--panel-tiles", "1", "--trials", "2", "--json"]
    code, printed = run("blas", *args)
    assert code == 0
    rows = [json.loads(text) for text in printed.out.splitlines()]
    assert [row["what"] for row in rows[::3]] == [
        "product", "division", "product beside reading", "division beside reading", "log-determinant"
    ]  # fmt: skip
    assert [row["way"] for row in rows] == ["addresses", "NumPy", "SciPy"] * 5
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) <= row["median"] <= max(row["seconds"])
        assert (row["way"] == "addresses") <= (row["ratio"] == 1)
        assert ("tiles_per_second" in row) == ("reading" in row["what"])
    bench = importlib.import_module("blas")
    exact = np.log(bench.eigenvalues(600)).sum()
    assert [row["logdet"] for row in rows[-3:]] == pytest.approx([exact] * 3, rel=1e-6)
    assert rows[-1]["cols"] < rows[-1]["rows"]
    assert bench.line(rows[0]).split()[0] == "product"


def test_ways_to_multiply_compute_the_same():
    bench = importlib.import_module("blas")
    for way in bench.WAYS.values():
        operands = bench.make_operands(5, 3)
        expected = operands.target - operands.tile @ operands.strip.T
        bench.operations(way, operands)["product"]()
        np.testing.assert_allclose(operands.target, expected, atol=1e-13)
        expected[:, :5] = expected[:, :5] @ np.linalg.inv(operands.lower).T
        bench.operations(way, operands)["division"]()
        np.testing.assert_allclose(operands.target, expected, atol=1e-12)


def test_times_of_kernel_functions_are_compared_trial_by_trial():
    script = importlib.import_module("kernel_function")
    assert script.ratio([1.0, 2.0, 9.0], [4.0, 4.0]) == {
        "of_medians": 0.5,
        "of_least": 0.25,
        "least": 0.25,
        "most": 0.5,
    }


@pytest.mark.slow
@pytest.mark.parametrize("output", ["full", "trace"])
def test_kernel_functions_are_compared(output):
    script = importlib.import_module("kernel_function")
    subject = script.Subject("linear", torch.nn.Linear(3, 2), torch.randn(4, 3))
    found = script.measure(subject, output, trials=1, torch_func_trials=1)
    assert found["relative_error"] <= TOLERANCES["float32"]
    assert set(found["ratios"]) == {"ntk", "torch.func"}
    assert "call / ntk" in script.line(found)
    expected = ntkgen.ntk(subject.model, subject.x, output=output)
    assert relative_error(script.torch_func(subject.model, subject.x, output).detach(), expected) <= 1e-5
    append = script.measure_append(subject, output, 1, folder=None, fsync=False)
    assert append["append_seconds"]["least"] > 0


def test_slow_regression_is_timed_for_each_algorithm_and_number_of_seeds(run):
    code, captured = run("slow_regression", "--samples", "20", "--trials", "1", "--seeds", "3", "--json")
    assert code == 0
    found = [json.loads(each) for each in captured.out.splitlines()]
    assert len({(each["algorithm"], each["optimizer"]) for each in found}) == len(found) == 8
    for each in found:
        for speed in each["samples_per_second"].values():
            assert 0 < speed["least"] <= speed["median"] <= speed["most"]
        per_step = 1e6 * each["seeds"] / each["samples_per_second"]["stack"]["median"]
        assert each["microseconds_per_step"] == pytest.approx(per_step)


def test_networks_are_timed_in_each_way_and_compared_with_the_double_loop(run, monkeypatch):
    bench = importlib.import_module("networks")
    row = importlib.import_module("zoo_of_networks").Row("absent", None, ("no_such_package",))
    monkeypatch.setitem(bench.ROWS, "absent", row)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)  # TorchJD takes part only where it is installed
    args = ["--rows", "mlp", "absent", "gru", "--trials", "2", "--threads", str(torch.get_num_threads())]
    code, printed = run("networks", *args, "--json")
    assert code == 0
    assert printed.err == "absent is skipped: no_such_package is not installed\n"
    mlp, gru = map(json.loads, printed.out.splitlines())
    assert (mlp["row"], mlp["n"], mlp["outputs"], mlp["fallback"]) == ("mlp", 64, 1, [])
    assert mlp["reference_samples"] == 64
    for way in mlp["ways"].values():
        assert way["error"] <= TOLERANCES["float32"]
        assert len(way["cpu_seconds"]) == len(way["wall_seconds"]) == 2
    ours, theirs = (np.median(mlp["ways"][name]["cpu_seconds"]) for name in ("ntkgen", "torch.func"))
    assert mlp["ratios"]["ntk"] == pytest.approx(ours / theirs)
    assert set(mlp["ratios"]) == {"ntk", "first", "function"}
    assert gru["ways"]["ntkgen"]["error"] <= 1e-5
    assert gru["ways"]["torch.func"]["verdict"] == "refuses"  # changes when PyTorch can differentiate a GRU in vmap
    assert gru["ways"]["torch.func"]["refusal"].startswith("RuntimeError: ")
    assert gru["ratios"] == {"ntk": None, "first": None, "function": None}
    long_names = gru | {"fallback": ["a_parameter_of_a_layer.weight"] * 20}
    text = "\n".join([bench.HEADER, *map(bench.lines, (mlp, long_names))])
    assert max(map(len, text.splitlines())) <= 100
    assert "falls back (20)" in text
    assert text.count("refuses") == 1


def test_a_kernel_that_is_not_that_of_the_double_loop_is_wrong():
    bench = importlib.import_module("networks")
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    exact = bench.reference(model, x, 2)
    assert bench.tried(bench.by_torch_func, model, x, exact).verdict == ""
    assert bench.tried(lambda model, x: 2 * ntkgen.ntk(model, x), model, x, exact).verdict == "wrong"
    assert bench.tried(lambda model, x: torch.full((8, 8), torch.nan), model, x, exact).verdict == "wrong"


def test_each_row_has_its_own_network_and_slow_rows_are_asked_for():
    bench = importlib.import_module("networks")
    quick = bench.chosen((), slow=False)
    assert {row.name for row in bench.chosen((), slow=True)} - {row.name for row in quick} == {
        "vit-tiny", "efficientnet", "swin"
    }  # fmt: skip
    assert bench.chosen(("swin",), slow=False) == [bench.ROWS["swin"]]
    for row in quick:
        if not row.packages:
            (model, x), (_, again) = row.subject(), row.subject()
            assert torch.equal(x, again)
            assert model(x[:3]).shape[0] == 3


QUICK_ROWS = (
    "gpt2", "llama", "gpt2-lora", "bert", "attention", "encoder", "lstm", "lstm-2-layers-both", "gru", "rnn",
    "rnn-bare", "state-space", "weight-norm", "spectral-norm", "graph", "deeponet", "fourier-features", "ntk-linear",
    "mlp", "lenet", "resnet20", "vgg-without-norm",
)  # fmt: skip


def test_the_rows_whose_kernels_are_compared_are_all_quick_ones():
    bench = importlib.import_module("networks")
    assert tuple(row.name for row in bench.chosen((), slow=False)) == QUICK_ROWS


def reduced(kernel, output, num_outputs):
    """Reduce a kernel of all outputs."""
    blocks = kernel.unflatten(1, (-1, num_outputs)).unflatten(0, (-1, num_outputs))  # (samples, m, samples, m)
    return {
        "full": kernel,
        "sum": blocks.sum((1, 3)),
        "trace": blocks.diagonal(dim1=1, dim2=3).sum(-1),
    }[output]


def error_of_autograd(model, x, exact):
    """The error of a float32 kernel from single backward passes."""
    module = evaluation_copy(model, torch.float32)
    names = [name for name, param in module.named_parameters() if param.requires_grad]
    rows = torch.cat([jacobian_rows(module, names, x[index : index + 1]) for index in range(len(x))]).flatten(0, 1)
    return relative_error(rows @ rows.mT, exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls old names of transformers
@pytest.mark.parametrize("name", QUICK_ROWS)
def test_each_row_has_the_kernel_of_the_double_loop(name, monkeypatch):
    row = importlib.import_module("zoo_of_networks").ROWS[name]
    if row.missing:
        pytest.skip(f"{' and '.join(row.missing)} is not installed")
    model, x = row.subject()
    x = x[:5]
    exact = reference_ntk(model, x)
    m = len(exact) // len(x)
    for joint_numbers in (0, dense.JOINT_NUMBERS):  # one output after the other, and all outputs at once
        monkeypatch.setattr(dense, "JOINT_NUMBERS", joint_numbers)
        for output in ("full", "trace", "sum"):
            expected = reduced(exact, output, m)
            for precision, dtype, allowed in (("float64", 8, 1e-10), ("float32", 4, 1e-5)):
                asked = dense.Request(output, precision)
                monkeypatch.setattr(dense, "BLOCK_BYTES", 4 << 30)
                plan = dense.plan_ntk(model, x, asked=asked)
                monkeypatch.setattr(dense, "BLOCK_BYTES", 2 * plan.jacobian.factor_bytes)
                assert [len(block) for block in dense.plan_ntk(model, x, asked=asked).rows] == [2, 2, 1]
                error = relative_error(ntkgen.ntk(model, x, output=output, precision=precision), expected)
                assert error <= allowed or (dtype == 4 and error <= 3 * error_of_autograd(model, x, exact)), output


def test_ntkgen_and_neural_tangents_are_timed_on_the_same_network(run, monkeypatch, tmp_path):
    bench = importlib.import_module("structured_derivatives")
    monkeypatch.setattr(bench, "SUBJECTS", {"mlp": 6})
    seen = []

    def theirs(folder, trials):
        arrays, layers = np.load(folder / "arrays.npz"), json.loads((folder / "layers.json").read_text())
        seen.append([layer["kind"] for layer in layers])
        model = bench.subject("mlp", 6)[0]
        assert np.array_equal(arrays["2_0"], model[2].weight.detach().numpy())
        return [1.0] * trials, 2 * reference_ntk(model, torch.from_numpy(arrays["x"]))

    monkeypatch.setattr(bench, "theirs", theirs)
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda _: None)
    code, printed = run("structured_derivatives", "--trials", "3", "--json")
    found = json.loads(printed.out)
    assert (code, found["row"], found["n"], seen) == (0, "mlp", 6, [["Linear", "Tanh", "Linear"]])
    assert found["times_faster"] == pytest.approx(1 / np.median(found["seconds"]["ntkgen"]))
    assert found["errors"]["ntkgen"] < 1e-5
    assert found["errors"]["neural-tangents"] == pytest.approx(1)


def test_a_failed_run_of_neural_tangents_is_explained(run, monkeypatch):
    bench = importlib.import_module("structured_derivatives")
    monkeypatch.setattr(bench, "SUBJECTS", {"mlp": 6})
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(
        bench.subprocess,
        "run",
        lambda *_, **__: importlib.import_module("subprocess").CompletedProcess([], 1, "", "no network\n"),
    )
    code, printed = run("structured_derivatives", "--trials", "1")
    assert code == 2
    assert "no network" in printed.err
