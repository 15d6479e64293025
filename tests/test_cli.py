"""The command line: its manners, and that each command calls one function with what was asked for."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

import ntkgen
from ntkgen import pipeline
from ntkgen.data import dataset as data
from ntkgen.engine import machine
from ntkgen.files.folder import LocalFolder
from ntkgen.plan.spec import KernelSpec
from ntkgen.store.store import KernelStore

FAST = ["compute", "--models", "logistic", "--epochs", "0", "--subsample", "6", "--tile", "20"]


@pytest.fixture
def split(monkeypatch):
    """Give the digits a test split: their last hundred."""
    load = data.load

    def load_split(name, *, data_dir=None, split="train", any_form=False):
        if name != "digits":
            return load(name, data_dir=data_dir, split=split, any_form=any_form)
        every = load(name)
        part = slice(0, 1697) if split == "train" else slice(1697, None)
        return dataclasses.replace(every, images=every.images[part], labels=every.labels[part])

    monkeypatch.setattr(data, "load", load_split)


def the_store(pattern="*"):
    return next(Path("runs").glob(f"{pattern}.zarr"))


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_an_interrupt_while_the_command_line_is_imported_is_one_line():
    script = """if True:
        import sys
        class Interrupt:
            def find_spec(self, name, *_):
                if name == "ntkgen.cli":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupt())
        from ntkgen.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_an_interrupt_promises_nothing_that_is_not_there(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkgen.continual.plan.load_data", interrupted)
    code, out, err = run("cl-run")
    assert (code, out) == (130, "")
    assert err.strip() == "Interrupted. What was finished before is kept. The same command continues from there."
    assert not list(tmp_path.iterdir())


def test_help_names_every_command_and_loads_no_torch():
    script = "import sys; from ntkgen import cli; code = cli.run(['--help']); sys.exit('torch' in sys.modules or code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in ("compute", "train", "info", "verify", "models", "datasets"))


def test_a_kernel_from_a_name_to_disk_and_back(run):
    code, out, err = run(*FAST, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["arrays"] == ["ntk_float16", "ntk_float32"]
    assert (result["model"], result["dataset"]) == ("logistic", "digits")
    assert (result["num_samples"], result["num_outputs"], result["num_params"]) == (6, 10, 30_730)
    assert result["train_accuracy"] is None
    assert Path(result["checkpoint"]).exists()
    assert ntkgen.open(result["store"]).array.shape == (60, 60)

    code, out, _ = run("info", result["store"])
    assert code == 0
    assert "complete" in out
    assert "6 of 6" in out
    assert json.loads(run("info", result["store"], "--json")[1])["tiles_missing"] == 0


def test_the_same_command_again_writes_nothing(run, run_once, tmp_path):
    run_once(*FAST)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_below(tmp_path)}
    code, out, _ = run(*FAST)
    assert code == 0
    assert "is complete" in out
    del before["runs"]  # a lock file comes and goes in it
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


def test_the_summary_says_how_to_open_it(run):
    _, out, _ = run(*FAST)
    line = next(line for line in out.splitlines() if "ntkgen.open(" in line)
    names = {"ntkgen": ntkgen}
    exec(line.strip(), names)
    assert names["kernel"].array[:10, :10].shape == (10, 10)


def test_several_models_dtypes_and_seeds(run):
    code, out, _ = run(
        "compute", "--dtype", "float64", "float32", "--models", "logistic", "lenet", "--repeats", "2", "--seed", "5",
        "--epochs=0", "--subsample", "3", "--json",
    )  # fmt: skip
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [Path(result["store"]).name for result in results] == [
        f"{model}-digits-untrained-seed{seed}-n3.zarr" for model in ("logistic", "lenet") for seed in (5, 6)
    ]
    assert all(result["arrays"] == ["ntk_float32", "ntk_float64"] for result in results)


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing_behind(run, tmp_path):
    code, out, _ = run(*FAST, "--dry-run")
    assert code == 0
    assert all(word in out for word in ("6 of 6 to compute", "disk", "memory", "FLOP"))
    projection = json.loads(run(*FAST, "--dry-run", "--json")[1])
    assert projection["disk_bytes"] == 9 * (20 * 20 * 2 + 4 + 20 * 20 * 4 + 4)
    assert projection["projected_flops"] > 0
    assert files_below(tmp_path) == []


def test_training_first_then_the_kernel_of_what_was_trained(run, tmp_path):
    options = ["--models", "logistic", "--dataset", "two.npz", "--bs", "8", "--lr", "0.01", "--target-accuracy", "90"]
    labels = np.arange(40) % 2
    images = np.random.default_rng(0).random((40, 3, 32, 32), dtype=np.float32) + labels[:, None, None, None]
    np.savez("two.npz", x=images.astype(np.float32), y=labels)
    code, out, _ = run("train", *options, "--json")
    trained = json.loads(out)
    assert code == 0
    assert trained["train_accuracy"] >= 90
    # the settings of the checkpoint hold where the command says nothing
    code, out, _ = run("compute", "--models", "logistic", "--dataset", "two.npz", "--target-accuracy", "90", "--json")
    result = json.loads(out)
    assert (code, result["train_accuracy"]) == (0, trained["train_accuracy"])
    assert (result["checkpoint"], result["num_outputs"]) == (trained["checkpoint"], 2)


def test_a_missed_target_is_an_error_and_can_be_allowed(run):
    options = ["compute", "--models", "logistic", "--epochs", "1", "--lr", "1e-9", "--subsample", "2"]
    code, out, err = run(*options)
    assert (code, out) == (1, "")
    assert "did not converge" in err
    assert "--allow-unconverged" in err
    assert list(Path("runs").glob("*.pt"))
    assert not list(Path("runs").glob("*.zarr"))
    code, out, _ = run(*options, "--allow-unconverged", "--json")
    assert code == 0
    assert json.loads(out)["train_accuracy"] < 99.5


def test_verbose_says_how_each_parameter_is_treated(run, tmp_path):
    (tmp_path / "odd_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale, self.fc = nn.Parameter(torch.ones(1)), nn.Linear(64, 10)\n"
        "        self.spare = nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x): return self.fc(self.scale * x.flatten(1))\n"
    )
    code, _, err = run("compute", "--models", "odd_nets:Odd", "--epochs", "0", "--subsample", "2", "--raw-images", "-v")
    assert code == 0
    assert "scale: no rule" not in err
    assert "spare: no rule, computed by autograd, " in err
    assert ", 2 samples at once" in err
    assert "fc: gram" in err or "fc: explicit" in err or "fc: ordered" in err


BAD = {
    "model": (["--models", "resnt18"], "Did you mean resnet18"),
    "no model": (["--models"], "--models"),
    "models swallow no flag": (["--models", "--seed", "1"], "--models"),
    "data set": (["--models", "lenet", "--dataset", "cifa"], "Did you mean cifar"),
    "dtype": (["--models", "lenet", "--dtype", "flot16"], "Did you mean float16"),
    "precision": (["--models", "lenet", "--precision", "float8"], "Unknown precision"),
    "tf32 on a CPU": (["--models", "lenet", "--precision", "tf32", "--device", "cpu"], "expected --device cuda"),
    "output": (["--models", "lenet", "--output", "nonsense"], "Unknown output 'nonsense'"),
    "output, no number": (["--models", "lenet", "--output", "index:"], "Did you mean index:K"),
    "output too large": (["--models", "lenet", "--output", "index:99"], "from 0 to 9"),
    "no test split": (["--models", "lenet", "--against", "test"], "no split 'test'"),
    "no test split of a file": (["--models", "lenet", "--dataset", "labels.npz", "--against", "test"], "no split"),
    "against the same": (["--models", "lenet", "--against", "train"], "--against"),
    "part of nothing": (["--models", "lenet", "--against-subsample", "5"], "for example --against test"),
    "subsample 0": (["--models", "lenet", "--subsample", "0"], "found 0"),
    "subsample negative": (["--models", "lenet", "--subsample", "-4"], "found -4"),
    "subsample too large": (["--models", "lenet", "--subsample", "1798"], "1797"),
    "second model": (["--models", "lenet", "nonet", "--epochs", "0"], "nonet"),
    "memory": (["--models", "lenet", "--memory", "1MB"], "1.0 MB are allowed"),
    "memory unit": (["--models", "lenet", "--memory", "much"], "much"),
    "tile": (["--models", "lenet", "--tile", "25"], "--tile 2"),
    "device": (["--models", "lenet", "--device", "cuda:99"], "cuda:99"),
    "option": (["--models", "lenet", "--sead", "1"], "--sead"),
    "width": (["--models", "lenet", "--width", "8"], "--width"),
    "missing npz": (["--models", "lenet", "--dataset", "none.npz"], "none.npz"),
    "npz without y": (["--models", "lenet", "--dataset", "x.npz"], "y"),
    "npz with nan": (["--models", "logistic", "--dataset", "nan.npz"], "not finite"),
    "labels out of range": (["--models", "badnets:three", "--dataset", "labels.npz"], "labels"),
    "mixing": (["--models", "badnets:mixing", "--epochs", "0"], "track_running_stats"),
    "shape": (["--models", "badnets:images", "--epochs", "0"], "one row per sample"),
    "other size": (["--models", "lenet", "--dataset", "labels.npz"], "does not accept"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_written(run, tmp_path, case):
    (tmp_path / "badnets.py").write_text(
        "from torch import nn\n"
        "def three(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
        "def mixing(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072, track_running_stats=False),"
        " nn.Linear(3072, 10))\n"
        "def images(): return nn.Conv2d(3, 10, 3)\n"
    )
    images = np.random.default_rng(0).random((4, 3, 2, 2)).astype(np.float32)
    np.savez("x.npz", x=images)
    np.savez("labels.npz", x=images, y=np.array([0, 1, 2, 5]))
    np.savez("nan.npz", x=np.full((4, 3, 2, 2), np.nan, np.float32), y=np.arange(4))
    before = files_below(tmp_path)
    args, part = BAD[case]
    code, out, err = run("compute", *args)
    assert (code, out) == (2, "")
    assert part in err
    assert err.count("\n") == 1
    assert [name for name in files_below(tmp_path) if "__pycache__" not in name] == before


def test_a_store_of_something_else_is_refused_and_kept(run, run_once, tmp_path):
    run_once(*FAST)
    store = next(Path("runs").glob("*.zarr"))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for change in (["--tile", "30"], ["--dtype", "float64"]):
        code, _, err = run(*FAST, *change)
        assert code == 2
        assert "holds another kernel" in err
        assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_both_triangles_hold_what_one_does_but_not_the_other_way_round(run):
    assert run(*FAST, "--layout", "upper")[0] == 0
    assert run(*FAST)[0] == 0
    code, _, err = run(*FAST, "--layout", "full")
    assert code == 2
    assert "ntkgen mirror" in err
    run(*FAST, "--seed", "1")
    assert run(*FAST, "--seed", "1", "--layout", "upper")[0] == 0


def test_no_room_on_disk_is_found_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalFolder, "free_bytes", 1000)
    code, _, err = run(*FAST)
    assert code == 2
    assert "1.0 kB are free" in err
    assert files_below(tmp_path) == []


def test_an_interruption_exits_130_says_how_to_go_on_and_loses_one_tile(run, monkeypatch):
    commit, committed = KernelStore.commit, []

    def interrupted(self, tile, values):
        if len(committed) == 3:
            raise KeyboardInterrupt
        committed.append(tile)
        commit(self, tile, values)

    with monkeypatch.context() as patch:
        patch.setattr(KernelStore, "commit", interrupted)
        code, _, err = run(*FAST)
    assert code == 130
    assert "same command" in err
    code, out, _ = run("info", next(Path("runs").glob("*.zarr")))
    assert "3 of 6" in out
    assert "in_progress" in out
    code, out, _ = run(*FAST, "--json")
    assert code == 0
    assert json.loads(out)["tiles_missing"] == 0


def test_a_full_disk_in_the_middle_is_one_line(run, monkeypatch):
    def full(self, tile, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KernelStore, "commit", full)
    code, _, err = run(*FAST)
    assert code == 1
    assert err.startswith("Error: The disk is full.")


def test_another_environment_needs_replan(run, run_once, monkeypatch):
    run_once(*FAST)
    store = next(Path("runs").glob("*.zarr"))
    (store / "ntk_float32" / "c" / "0" / "0").unlink()
    real = machine.environment
    changed = lambda device, threads=None: type(real(device))("cpu", "another", "9.9", threads or 1)  # noqa: E731
    monkeypatch.setattr(machine, "environment", changed)
    code, _, err = run(*FAST)
    assert code == 2
    assert "--replan" in err
    assert "torch version" in err
    assert run(*FAST, "--replan")[0] == 0
    assert run(*FAST)[0] == 0  # nothing is missing any more, so nothing can differ
    assert ntkgen.open(store).manifest.replanned == 1
    assert not np.isnan(ntkgen.open(store).array[:]).any()


def test_info_of_what_is_no_store(run, tmp_path):
    code, _, err = run("info", tmp_path / "nothing.zarr")
    assert code == 2
    assert "There is no kernel store" in err


def test_listings(run):
    _, out, _ = run("models")
    assert "resnet18       11,173,962  He, Zhang, Ren, Sun (2016)" in out
    _, out, _ = run("datasets")
    assert "cifar10" in out
    assert "1,797" in out
    assert json.loads(run("datasets", "--json")[1].splitlines()[0])["aliases"] == ["cifar"]


def test_options_reach_the_pipeline(run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pipeline, "plan_kernel", lambda *args: asked.append(args) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    run(
        "compute", "--models", "resnet9", "--width", "16", "--num_epochs", "7", "--batch-size", "32", "--lr", "0.3",
        "--seed", "4", "--target-accuracy", "80", "--subsample", "9", "--shuffle-seed", "2", "--precision", "float64",
        "--dtype", "float64", "--layout", "upper", "--tile", "30", "--memory", "3GB", "--out", "elsewhere",
    )  # fmt: skip
    (training, kernel, place, _, against) = asked[0]
    assert training == pipeline.TrainingRequest("resnet9", 4, 16, 7, 32, 0.3, 80.0)
    spec = KernelSpec("full", "float64", ("float64",), "upper", 30, 3 * 10**9)
    assert kernel == pipeline.KernelRequest(9, 2, spec=spec)
    assert place.out == LocalFolder(Path("elsewhere"))
    assert against is None


def test_options_of_rectangular_and_mapped_kernels_reach_the_pipeline(run, split, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pipeline, "plan_kernel", lambda *args: asked.append(args) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    run(
        "compute", "--models", "lenet", "--output", "index:3", "--against", "test", "--against-subsample", "7",
        "--precision", "bfloat16", "--dtype", "float32", "--replan", "--no-certify",
    )  # fmt: skip
    (_, kernel, _, train, test) = asked[0]
    spec = KernelSpec("index:3", "bfloat16", ("float32",), replan=True, certify=False)
    assert kernel == pipeline.KernelRequest(against="test", against_subsample=7, spec=spec)
    assert (train.num_samples, test.num_samples) == (1697, 100)


def test_a_damaged_finished_store_is_put_in_order_by_the_same_command(run, run_once):
    run_once(*FAST)
    store = next(Path("runs").glob("*.zarr"))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    (store / "row_label/c/0").unlink()
    (store / "ntk_float32/zarr.json").unlink()
    (store / "ntk_float16/zarr.json").write_bytes(b'{"shape": [')
    for file in store.glob("diagonal/**/*"):
        file.unlink() if file.is_file() else None
    flipped = bytearray(before[store / "col_output/c/0"])
    flipped[3] ^= 1
    (store / "col_output/c/0").write_bytes(flipped)
    (store / "logits/c/1/0").write_bytes(before[store / "logits/c/1/0"][:-1])
    assert "in_progress" in run("info", store)[1]
    assert run(*FAST)[0] == 0
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_replan_leaves_a_complete_store_alone(run, run_once):
    run_once(*FAST)
    store = next(Path("runs").glob("*.zarr"))
    before = (store / "zarr.json").read_bytes()
    assert run(*FAST, "--replan", "--memory", "200MB")[0] == 0
    assert (store / "zarr.json").read_bytes() == before


@pytest.mark.slow
def test_a_higher_target_does_not_touch_what_a_store_was_made_of(run):
    options = ["compute", "--models", "logistic", "--subsample", "4", "--lr", "0.01", "--bs", "256"]
    assert run(*options, "--target-accuracy", "20")[0] == 0
    before = next(Path("runs").glob("*.pt")).read_bytes()
    code, _, err = run(*options, "--target-accuracy", "99.9")
    assert code == 1
    assert "did not converge" in err
    assert next(Path("runs").glob("*.pt")).read_bytes() == before
    assert run(*options, "--target-accuracy", "20")[0] == 0


def test_a_file_is_the_same_from_wherever_it_is_named(run, tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((4, 3, 2, 2)).astype(np.float32)
    np.savez("four.npz", x=images, y=np.arange(4))
    command = ["compute", "--models", "nets4:net", "--epochs", "0", "--out", str(tmp_path / "out")]
    (tmp_path / "nets4.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))\n")
    assert run(*command, "--dataset", "four.npz")[0] == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    code, _, err = run(*command, "--dataset", str(tmp_path / "four.npz"))
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "change",
    [["--lr", "nan"], ["--lr", "inf"], ["--target-accuracy", "nan"], ["--seed", str(10**30)], ["--device", "cpu:"],
     ["--out", "a_file/below"], ["--models", "raising:net", "--epochs", "0"], ["--models", "broken_module:net"],
     ["--models", ":net"]],
    ids=" ".join,
)  # fmt: skip
def test_odd_values_and_broken_code_are_one_line_too(run, tmp_path, change):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "broken_module.py").write_text("def net(:\n")
    (tmp_path / "raising.py").write_text(
        "from torch import nn\n"
        "class net(nn.Linear):\n"
        "    def __init__(self): super().__init__(1, 1)\n"
        "    def forward(self, x): return {}['nothing']\n"
    )
    before = files_below(tmp_path)
    code, out, err = run("compute", "--models", "logistic", "--subsample", "3", *change)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert [name for name in files_below(tmp_path) if "__pycache__" not in name] == before


def test_the_disk_must_have_room_for_all_networks_together(run, tmp_path, monkeypatch):
    one = json.loads(run(*FAST, "--dry-run", "--json")[1])["disk_bytes"]
    monkeypatch.setattr(LocalFolder, "free_bytes", one * 3 // 2)
    assert run(*FAST, "--dry-run")[0] == 0
    code, _, err = run(*FAST, "--repeats", "2")
    assert code == 2
    assert "no room" in err
    assert files_below(tmp_path) == []


def test_networks_of_one_module_instance_do_not_train_each_other(run, tmp_path):
    (tmp_path / "shared_net.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    command = ["train", "--models", "shared_net:net", "--raw-images", "--epochs", "1", "--allow-unconverged", "--json"]
    code, out, _ = run(*command, "--repeats", "2")
    losses = [json.loads(line)["train_loss"] for line in out.splitlines()]
    assert code == 0
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # both began from the same network


# rectangular kernels and output maps ----------------------------------------------------------------------------------

RECTANGULAR = [*FAST, "--against", "test", "--against-subsample", "4"]


def test_a_rectangular_kernel_from_the_command_to_its_page(run, split):
    code, out, err = run(*RECTANGULAR)
    assert (code, err) == (0, "")
    assert "the kernel of 6 samples against 4 × 10 outputs is complete" in out
    assert "no singular value has an error above" in out
    store = the_store()
    assert store.name == "logistic-digits-untrained-seed0-n6-test4.zarr"
    assert ntkgen.open(store).array.shape == (60, 40)
    _, page, _ = run("info", store)
    assert "6 samples against 4 of its test split" in page
    assert "J Jᵀ, 60 × 40" in page
    assert run("verify", store, "--certify", "-q")[0] == 0


def test_one_triangle_and_too_few_columns_of_a_rectangular_kernel_are_refused(run, split, tmp_path):
    for change in (["--layout", "upper"], ["--against-subsample", "0"], ["--against-subsample", "101"]):
        code, out, err = run(*RECTANGULAR, *change)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "shape", "name", "meaning"),
    [
        ("sum", (6, 6), "sum", "the sum of the outputs"),
        ("centered", (54, 54), "centered", "contrasts"),
        ("index:3", (6, 6), "index3", "this output alone"),
        ("trace", (6, 6), "trace", "the trace"),
        ("diagonal", (6, 6), "diagonal", "the diagonal"),
    ],
)
def test_kernels_of_output_maps(run, output, shape, name, meaning):
    code, out, _ = run(*FAST[:-2], "--output", output, "--dtype", "float32")
    assert code == 0
    assert f"{shape[0]} × {shape[1]}, output {output}" in out
    store = the_store(f"*-{name}")
    assert ntkgen.open(store).kernel(output=3 if output == "diagonal" else None).shape == shape
    page = run("info", store)[1]
    assert f"{output}: {meaning}" in page
    assert "from the comparison of every entry" in page
    assert f"no eigenvalue{' of a matrix' if output == 'diagonal' else ''} has an error above" in page


def test_a_kernel_against_published_test_images(run):
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "MNIST").exists():
        pytest.skip("there is no MNIST here")
    options = ["--dataset", "mnist", "--data-dir", folder, "--against", "test", "--against-subsample", "3"]
    assert run("compute", "--models", "logistic", "--epochs", "0", "--subsample", "4", *options)[0] == 0
    assert run("verify", the_store(), "--certify", "--data-dir", folder)[0] == 0


# certificates ---------------------------------------------------------------------------------------------------------


def test_a_finished_kernel_is_certified_and_pages_say_what_that_means(run):
    result = json.loads(run(*FAST, "--json")[1])
    assert result["inaccuracy"] is None
    assert [error["dtype"] for error in result["certificate"]["errors"]] == ["float16", "float32"]
    assert "seconds" not in result["certificate"]
    result = json.loads(run("verify", the_store(), "--certify", "--probes", "10", "--json")[1])
    page = run("info", the_store())[1]
    bound = result["certificate"]["errors"][1]["bound"]
    assert f"‖E‖_F ≤ {bound:.3g} with 95 % confidence" in page
    assert "from 10 random vectors and 16 pairs of samples, seed 0" in page
    assert "no eigenvalue has an error above the bound on ‖E‖_F" in page
    assert "in float16  0 computed entries have fewer bits" in page
    assert f"{bound:.3g} in float32" in run(*FAST)[1]


@pytest.mark.slow
def test_a_store_without_a_certificate_gets_one_by_the_same_command(run, run_once):
    run_once(*FAST)
    store = the_store()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    run(*FAST, "--no-certify", "--out", "plain")
    plain = Path("plain") / store.name
    assert "none yet" in run("info", plain)[1]
    assert run(*FAST, "--out", "plain")[0] == 0
    assert (plain / "zarr.json").read_bytes() == before[store / "zarr.json"]
    assert run(*FAST, "--no-certify")[0] == 0  # and keeps one that is there
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def wrong_tiles(monkeypatch):
    """Make the second tile of a row wrong, as a damaged memory would."""
    commit = KernelStore.commit

    def spoilt(self, tile, values):
        commit(self, tile, values * (1.5 if (tile.row, tile.col) == (0, 1) else 1))

    monkeypatch.setattr(KernelStore, "commit", spoilt)


def test_a_suspicious_kernel_is_stored_and_said_to_be_so_with_exit_code_1(run, monkeypatch):
    wrong_tiles(monkeypatch)
    many = [*FAST[:-4], "--subsample", "10", "--tile", "20"]
    code, out, err = run(*many, "--json")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("Error: The kernel at runs/")
    assert "(0, 1)" in err
    result = json.loads(out)
    assert (result["status"], result["tiles_missing"]) == ("complete", 0)
    assert [0, 1] in result["suspicious_tiles"]["float32"][:3]
    assert "SUSPICIOUS blocks of rows: 0, 1" in run("info", the_store())[1]
    assert json.loads(run("verify", the_store(), "--json")[1])["is_whole"]  # every file is what was written
    assert run("verify", the_store(), "--certify")[0] == 1


@pytest.mark.slow
def test_what_is_computed_more_precisely_than_stored_is_said_once(run):
    careful = [*FAST, "--precision", "float64-accumulate"]
    code, _, err = run(*careful, "--models", "logistic", "lenet", "--no-certify")
    assert code == 0
    assert err.count("Warning") == err.count("\n") == 1
    assert "adds an error of about 1e-7" in err
    assert "--dtype float64" in err
    assert "adds an error of about 1e-7" in run("info", the_store("logistic*"))[1]
    assert run(*careful, "--dtype", "float64", "float32", "--out", "other")[2] == ""
    assert run(*careful, "--dtype", "float16", "--dry-run", "--out", "half")[2].count("5e-4") == 1
    page = run("info", next(Path("other").glob("*.zarr")))[1]
    assert "adds an error" not in page


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_reads_every_file_and_says_what_a_store_holds(run, run_once):
    run_once(*FAST)
    code, out, err = run("verify", the_store())
    assert (code, err) == (0, "")
    assert "every file of ntk_float16, ntk_float32 is whole, 60 × 60" in out
    result = json.loads(run("verify", the_store(), "--json")[1])
    assert (result["is_whole"], result["damage"]) == (True, [])


def test_verify_names_what_is_damaged_and_missing_and_what_to_do(run, run_once):
    run_once(*FAST)
    store = the_store()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    (store / "ntk_float16/c/0/1").unlink()
    flipped = bytearray(before[store / "ntk_float32/c/1/2"])
    flipped[7] ^= 1
    (store / "ntk_float32/c/1/2").write_bytes(flipped)
    (store / "ntk_float32/c/2/2").write_bytes(before[store / "ntk_float32/c/2/2"][:-1])
    code, out, err = run("verify", store, "--certify", "--json")
    assert (code, err.count("\n")) == (1, 1)
    assert {each["file"]: each["problem"] for each in json.loads(out)["damage"]} == {
        "ntk_float16/c/0/1": "missing",
        "ntk_float32/c/1/2": "damaged",
        "ntk_float32/c/2/2": "cut short",
    }
    assert re.search(r"run `ntkgen verify --repair \S+`, then run the same `ntkgen compute`", err)
    assert "damaged     ntk_float32/c/1/2" in run("verify", store)[1]
    (store / "ntk_float32/c/1/2").unlink()
    assert run(*FAST)[0] == 0
    assert run("verify", store)[0] == 0
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_verify_of_several_stores_reads_all_of_them(run, run_once):
    run_once(*FAST)
    run(*FAST[:-2], "--subsample", "4")
    first, second = sorted(Path("runs").glob("*.zarr"))
    (first / "ntk_float32/c/0/0").unlink()
    code, out, err = run("verify", first, second)
    assert (code, err.count("\n")) == (1, 1)
    assert re.findall(r"^runs/.*", out, re.MULTILINE) == [str(first), str(second)]
    assert run("verify", "nothing.zarr")[0] == 2


@pytest.mark.slow
def test_verify_certifies_anew_with_other_probes(run, run_once):
    run_once(*FAST)
    store = the_store()
    before = (store / "zarr.json").read_bytes()
    options = ["--certify", "--probes", "3", "--pairs", "2", "--seed", "5", "--json"]
    result = json.loads(run("verify", store, *options)[1])
    found = result["certificate"]
    assert (found["num_probes"], found["num_pairs"], found["seed"]) == (3, 2, 5)
    assert ntkgen.open(store).manifest.certificate.to_json() == found
    assert run("verify", store, "--certify")[0] == 0
    assert (store / "zarr.json").read_bytes() == before
    run(*FAST[:-2], "--output", "trace")
    certificate = (the_store("*-trace") / "zarr.json").read_bytes()
    assert run("verify", the_store("*-trace"), "--certify")[0] == 0
    assert (the_store("*-trace") / "zarr.json").read_bytes() == certificate
    code, _, err = run("verify", store, "--certify", "--probes", "0")
    assert (code, err.count("\n")) == (2, 1)


def test_verify_finds_wrong_numbers_that_have_a_right_checksum(run):
    run(*FAST[:-4], "--subsample", "10", "--tile", "20")
    zarr.open_group(the_store(), mode="r+")["ntk_float32"][20:40, 60:80] *= 2
    assert run("verify", the_store())[0] == 0
    code, _, err = run("verify", the_store(), "--certify")
    assert code == 1
    assert "(1, 3)" in err


def test_the_whole_way_in_a_process_of_its_own(run, tmp_path):
    images = np.random.default_rng(0).random((6, 3, 32, 32), np.float32)
    np.savez(tmp_path / "six.npz", x=images, y=np.arange(6))
    options = ["--models", "logistic", "--dataset", "six.npz", "--epochs", "0", "--output", "centered", "--no-certify"]
    command = [sys.executable, "-m", "ntkgen", "compute", *options]
    computed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (computed.returncode, computed.stderr) == (0, "")
    store = next((tmp_path / "runs").glob("*.zarr"))
    (store / "ntk_float32/c/0/0").unlink()
    code, _, err = run("verify", store)
    assert (code, err.count("\n")) == (1, 1)
