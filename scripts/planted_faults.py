"""Plant faults in a copy of the sources, one at a time, and say which of them the tests find.

    uv run python scripts/planted_faults.py [NAME …] [--all] [--tree FOLDER]

A fault is a line that is wrong in a way that a person could write. For each the test files that should see it are run,
with ``--all`` every test of the default run, until the first failure. Before a change of the tests and after it, the
same faults must be found. The exit code is 1 where one was not, 2 where a line is no longer there.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import dask.array  # noqa: F401 - what every test file imports is imported once, but for plugins of pytest
import pytest
import torch  # noqa: F401
import xarray  # noqa: F401

ROOT = Path(__file__).parents[1]
COPIED = ("ntkgen", "models", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    """A line as it is, the same line as it should not be, and the test files that are to see it."""

    name: str
    file: str  # within the package
    right: str  # occurs once
    wrong: str
    tests: str  # names of test files, without test_


FAULTS = (
    # what is computed
    Fault(
        "dropped layer: the last one adds nothing to the kernel",
        "jacobian/contract.py",
        "zip(left.pairs, right.pairs, strict=True)",
        "zip(left.pairs[:-1], right.pairs[:-1], strict=True)",
        "contract engine",
    ),
    Fault(
        "wrong order of multiplication: a Gram matrix is transposed before it is carried",
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
        "if module.padding_idx is not None:",
        "if module.padding_idx:",
        "layers contract engine",
    ),
    Fault(
        "dropped group: the exact diagonal is of the first group of channels alone",
        "jacobian/contract.py",
        "for number in range(layer.plan.shape.groups):",
        "for number in range(1):",
        "contract engine",
    ),
    Fault(
        "ragged last block: the last tile of other samples is left out",
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
        "off by one: one block more is held than fits",
        "plan/plan.py",
        "fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes)",
        "fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes) + 1",
        "plan",
    ),
    # what is stored
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
        "if there == size and _CHUNK.match(key, first)",
        "if there <= size and _CHUNK.match(key, first)",
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
        "unclosed sweep: what interrupted writes leave is never removed",
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
    # what is made of it
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
        "wrong exit code: a damaged store is none of its problems",
        "cli/verify.py",
        "finding.problems.append((problem, DAMAGED))",
        "finding.notes.append(problem)",
        "verify cli",
    ),
)


def main() -> int:
    """Plant the chosen faults in turn, and print a line for each."""
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
    parser.add_argument("names", nargs="*", help="parts of the names of some faults; else all")
    parser.add_argument("--all", action="store_true", help="run every test of the default run, not the listed files")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the sources and tests; else those of this checkout")
    return parser.parse_args()


def _copied(tree: Path, copy: Path) -> Path:
    """Copy what the tests need."""
    copy.mkdir()
    for name in COPIED:
        source = tree / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def _tried(copy: Path, fault: Fault, *, every_test: bool) -> tuple[int, str]:
    """Plant a fault, run tests until the first failure, and take it out again."""
    file = copy / "ntkgen" / fault.file
    text = file.read_text() if file.exists() else ""
    if text.count(fault.right) != 1:
        return 2, f"NOT THERE: {fault.file} has no line, or several, of {fault.right.strip()!r}"
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
    """Run pytest on the copy, in a child of this process, which has imported what takes long; none of the package."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                os.chdir(copy)
                os.environ["PYTHONPATH"] = str(copy)  # in every process that a test starts
                sys.path.insert(0, str(copy))
                options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-n", "0"]
                code = int(pytest.main([*options, *arguments]))
            except Exception as error:  # noqa: BLE001 - what is wrong is printed by the parent
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
