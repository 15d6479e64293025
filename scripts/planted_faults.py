"""Insert faults into a copy of the sources, one at a time, and print which of them the tests find.

    uv run python scripts/planted_faults.py [NAME …] [--all] [--tree FOLDER]

A fault is a wrong line, such as a programmer could write by mistake. For each fault, the tests that should find it run
until the first failure. With ``--all``, all tests of the default run are used. Run the script before and after a change
of the tests. Both runs must find the same faults. The exit code is 1 if a fault was not found, and 2 if a line to
replace no longer exists.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import dask.array  # noqa: F401 - the slow imports of every test file, made once for all faults
import pytest
import torch  # noqa: F401
import xarray  # noqa: F401

ROOT = Path(__file__).parents[1]
COPIED = ("ntkgen", "models", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    """A correct line, its wrong replacement, and the test files that should find the replacement."""

    name: str
    file: str  # relative to the package
    right: str  # must occur exactly once in the file
    wrong: str
    tests: str  # names of test files without test_


FAULTS = (
    # computation
    Fault(
        "dropped layer: the last one adds nothing to the kernel",
        "jacobian/contract.py",
        "zip(*pairs, strict=True)",
        "zip(*(each[:-1] for each in pairs), strict=True)",
        "contract engine",
    ),
    Fault(
        "wrong order of multiplication: a Gram matrix is transposed before its product",
        "jacobian/contract.py",
        "grams.permute(2, 0, 1, 3).contiguous()",
        "grams.permute(2, 0, 3, 1).contiguous()",
        "contract",
    ),
    Fault(
        "wrong index: windows of a dilated convolution",
        "jacobian/windows.py",
        "shift = tap * self.dilation - self.padding",
        "shift = tap - self.padding",
        "windows layers contract",
    ),
    Fault(
        "missing term: the padding token of an embedding gets a gradient",
        "jacobian/layers.py",
        "if padding is not None:",
        "if padding:",
        "layers contract engine",
    ),
    Fault(
        "dropped group: the exact diagonal uses only the first group of channels",
        "jacobian/contract.py",
        "for number in range(layer.plan.shape.groups):",
        "for number in range(1):",
        "contract engine",
    ),
    Fault(
        "ragged last block: the last tile of the columns is left out",
        "plan/tiles.py",
        "return -(-self.num_cols // self.side)",
        "return max(1, self.num_cols // self.side)",
        "tiles engine store",
    ),
    Fault(
        "wrong samples: columns of other samples begin at the first of the rows",
        "plan/plan.py",
        "return Block(first + block.start, first + block.stop).pieces(self.block_samples)",
        "return Block(block.start, block.stop).pieces(self.block_samples)",
        "engine compute plan",
    ),
    Fault(
        "off by one: one block too many is kept in memory",
        "plan/plan.py",
        "fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes)",
        "fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes) + 1",
        "plan",
    ),
    # storage
    Fault(
        "wrong scale: float16 may overflow",
        "store/rounding.py",
        "exponent - 1 if mantissa == 0.5 else exponent)",
        "exponent - 2)",
        "rounding store",
    ),
    Fault(
        "wrong row order: labels belong to outputs first",
        "store/schema.py",
        "= np.repeat(side.labels, m)",
        "= np.tile(side.labels, m)",
        "store symmetric engine",
    ),
    Fault(
        "missing transpose in the mirrored view",
        "store/view.py",
        "product[cols] += self._part(tile, values.T, V[rows])",
        "product[cols] += self._part(tile, values, V[rows])",
        "symmetric",
    ),
    Fault(
        "wrong transpose: the mirrored file has the bytes of the tile",
        "store/store.py",
        "np.ascontiguousarray(values.swapaxes(-1, -2))",
        "values.reshape(values.swapaxes(-1, -2).shape)",
        "store mirror engine",
    ),
    Fault(
        "off by one in resume: a file that was cut short counts as done",
        "store/schema.py",
        "if file_size == size and _CHUNK.match(key, first)",
        "if file_size <= size and _CHUNK.match(key, first)",
        "store engine",
    ),
    Fault(
        "skipped checksum: verify reads past a flipped bit",
        "checks/verify.py",
        'google_crc32c.value(payload) != int.from_bytes(data[-CHECKSUM_BYTES:], "little")',
        "not google_crc32c.value(payload) and data",
        "verify",
    ),
    Fault(
        "stale certificate: it stays after damage was removed",
        "checks/verify.py",
        "replace(store.manifest, is_complete=False, certificate=None)",
        "replace(store.manifest, is_complete=False)",
        "verify cli",
    ),
    Fault(
        "missing sweep: temporary files of interrupted writes are never removed",
        "store/tidy.py",
        "    store.folder.sweep()\n    _remove_old",
        "    _remove_old",
        "engine store kill",
    ),
    Fault(
        "lock not taken",
        "files/lock.py",
        "        fcntl.flock(file, kind | fcntl.LOCK_NB)\n",
        "        pass\n",
        "lock",
    ),
    Fault(
        "not atomic: a file is written in its place",
        "files/durable.py",
        'draft = beside(path, f".{uuid.uuid4().hex}{PARTIAL}")',
        "draft = path",
        "folders store kill",
    ),
    Fault(
        "wrong fingerprint: which parameters are trainable is not hashed",
        "fingerprints.py",
        'value, f"{name in trainable}|")',
        'value, "")',
        "checkpoint compute",
    ),
    Fault(
        "off by one in resume: training repeats an epoch",
        "training/fit.py",
        "self.epoch = checkpoint.epoch\n",
        "self.epoch = max(0, checkpoint.epoch - 1)\n",
        "training",
    ),
    # analysis
    Fault(
        "wrong sign of a determinant",
        "analysis/determinant.py",
        "np.cumprod(np.sign(pivots))",
        "np.cumprod(np.abs(np.sign(pivots)))",
        "logdet",
    ),
    Fault(
        "wrong eigenvalue count: below the error counts as above",
        "analysis/eigenvalues.py",
        "int((values > norm).sum())",
        "int((np.abs(values) > -norm).sum())",
        "spectrum",
    ),
    Fault(
        "wrong block: leaving a sample out leaves its first output out",
        "analysis/regression.py",
        "np.linalg.solve(blocks, by_sample)",
        "by_sample / np.einsum('iaa->ia', blocks)[..., None]",
        "regression",
    ),
    Fault(
        "dropped shift: the determinant is that of K",
        "analysis/linalg/cholesky.py",
        'np.einsum("ii->i", panel.tile(row, row))[:] += shift',
        'np.einsum("ii->i", panel.tile(row, row))[:] += 0 * shift',
        "logdet",
    ),
    Fault(
        "wrong exit code: a damaged store is not a problem",
        "cli/verify.py",
        "finding.problems.append((problem, DAMAGED))",
        "finding.notes.append(problem)",
        "verify cli",
    ),
)


def main() -> int:
    """Insert the chosen faults one after the other, and print the result for each."""
    options = _options()
    chosen = [fault for fault in FAULTS if not options.names or any(name in fault.name for name in options.names)]
    codes = []
    with tempfile.TemporaryDirectory(prefix="ntkgen-planted-") as folder:
        copy = _copied(options.tree, Path(folder) / "tree")
        for fault in chosen:
            code, line = _tried(copy, fault, every_test=options.all)
            codes.append(code)
            print(f"{fault.name}\n    {line}", flush=True)
    print(f"{codes.count(0)} of {len(codes)} faults were found")
    return max(codes, default=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the faults [all]")
    parser.add_argument(
        "--all", action="store_true", help="run all tests of the default run instead of the listed files"
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="folder of the sources and tests [this checkout]")
    return parser.parse_args()


def _copied(tree: Path, copy: Path) -> Path:
    """Copy the files that the tests need."""
    copy.mkdir()
    for name in COPIED:
        source = tree / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def _tried(copy: Path, fault: Fault, *, every_test: bool) -> tuple[int, str]:
    """Insert a fault, run tests until the first failure, and remove the fault."""
    file = copy / "ntkgen" / fault.file
    text = file.read_text() if file.exists() else ""
    if text.count(fault.right) != 1:
        return 2, f"NOT THERE: {fault.file} must have exactly one line with {fault.right.strip()!r}"
    file.write_text(text.replace(fault.right, fault.wrong))
    try:
        files = ["-n", "auto"] if every_test else [f"tests/test_{name}.py" for name in fault.tests.split()]
        code, printed = _tested(copy, files)
    finally:
        file.write_text(text)
    first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    if code == 0:
        return 1, "NOT FOUND"
    return (0, f"found by {first[1]}") if first else (2, f"NO RUN: {printed[-300:]}")


def _tested(copy: Path, arguments: list[str]) -> tuple[int, str]:
    """Run pytest on the copy in a child process.

    The child inherits the slow imports of this process. This process has not imported ntkgen.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                os.chdir(copy)
                os.environ["PYTHONPATH"] = str(copy)  # for processes that a test starts
                sys.path.insert(0, str(copy))
                options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-n", "0"]
                code = int(pytest.main([*options, *arguments]))
            except Exception as error:  # noqa: BLE001 - the parent process prints the error
                print(repr(error))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


if __name__ == "__main__":
    sys.exit(main())
