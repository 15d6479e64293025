"""The size of files and functions, and the lines of the code that a script names."""

import ast
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
SOURCES = [path for folder in ("ntkgen", "models", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 150
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 1000
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_the_lines_of_the_planted_faults_are_still_there():
    faults = runpy.run_path(str(ROOT / "scripts" / "planted_faults.py"))["FAULTS"]
    assert len(faults) >= 20
    sources = {fault: (ROOT / "ntkgen" / fault.file).read_text(encoding="utf-8") for fault in faults}
    assert [fault.name for fault, source in sources.items() if source.count(fault.right) != 1] == []
    assert [fault.name for fault in faults if fault.wrong == fault.right] == []
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for fault in faults for name in fault.tests.split())
