"""The recipes for clusters: workers started by hand, jobs of a queue, and an array of jobs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import files_of

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import slurm_cluster  # noqa: E402

OPTIONS = [
    "--models", "logistic", "--dataset", "digits", "--epochs", "0", "--subsample", "60", "--tile", "100",
    "--memory", "1GB", "--dtype", "float32", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "NTKGEN_THREADS": "1"}


@pytest.fixture(scope="module")
def expected(environment, tmp_path_factory):
    """The bytes that one process writes."""
    out = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "ntkgen", "compute", *OPTIONS, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return files_of(out)


@pytest.mark.slow
def test_workers_that_were_started_by_hand_are_found_by_the_schedulers_file(expected, environment, tmp_path):
    file, out = tmp_path / "scheduler.json", tmp_path / "runs"
    dask = [sys.executable, "-m", "dask"]
    started = [
        [*dask, "scheduler", "--scheduler-file", str(file), "--port", "0", "--dashboard-address", "127.0.0.1:0"],
        [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--memory-limit", "2GB"],
    ]
    processes = [
        subprocess.Popen(each, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for each in started
    ]
    try:
        while not file.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        command = [sys.executable, "-m", "ntkgen", "compute", *OPTIONS, "--scheduler", str(file), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
    assert files_of(out) == expected


@pytest.mark.slow
def test_an_array_of_jobs_makes_one_kernel(expected, environment, tmp_path):
    for number in (7, 8):  # an array may begin anywhere
        job = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_COUNT": "2"}
        uv = tmp_path / "bin" / "uv"
        uv.parent.mkdir(exist_ok=True)
        uv.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -m ntkgen "$@"\n')  # `uv run ntkgen` of this Python
        uv.chmod(0o755)
        env = {**environment, **job, "PATH": f"{uv.parent}{os.pathsep}{environment['PATH']}"}
        command = ["bash", str(SCRIPTS / "slurm_array.sh"), *OPTIONS, "--out", str(tmp_path / "runs")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    assert files_of(tmp_path / "runs") == expected


def test_a_job_script_outside_an_array_says_how_it_is_submitted(environment):
    done = subprocess.run(
        ["bash", str(SCRIPTS / "slurm_array.sh")], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode != 0
    assert "Submit this script with sbatch" in done.stderr


def test_the_jobs_of_a_queue_ask_for_what_a_worker_needs():
    dask_jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    asked = slurm_cluster.Resources(1, 8, "64GB", "04:00:00", ("--partition=gpu",))
    with dask_jobqueue.SLURMCluster(**slurm_cluster.job_settings(asked)) as cluster:
        script = cluster.job_script()
    for line in ("--gres=gpu:1", "--partition=gpu", "--cpus-per-task=8", "-t 04:00:00", "export NTKGEN_THREADS=8"):
        assert line in script
    for option in ("--nthreads 1", "--lifetime 14100s", "--resources GPU=1"):
        assert option in script


SBATCH = """#!/bin/sh
for script; do :; done
copy="$FAKE_QUEUE/job-$$.sh"
cp "$script" "$copy"
nohup bash "$copy" > "$copy.log" 2>&1 &
echo "Submitted batch job $!"
"""


@pytest.mark.slow
def test_the_jobs_of_a_queue_make_a_kernel(expected, environment, tmp_path):
    """With a queue that starts each job at once on this machine."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    queue = tmp_path / "queue"
    queue.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", '#!/bin/sh\nkill "$@"\n')):
        (queue / name).write_text(text)
        (queue / name).chmod(0o755)
    env = {**environment, "FAKE_QUEUE": str(queue), "PATH": f"{queue}{os.pathsep}{environment['PATH']}"}
    asked = ["--jobs", "2", "--gpus", "0", "--cores", "1", "--memory", "2GB", "--walltime", "00:10:00"]
    command = [sys.executable, str(SCRIPTS / "slurm_cluster.py"), *asked, "--", *OPTIONS]
    command += ["--out", str(tmp_path / "runs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env, cwd=tmp_path, timeout=200)
    assert files_of(tmp_path / "runs") == expected
    assert len(list(queue.glob("job-*.sh"))) >= 2
