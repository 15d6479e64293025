"""Any terminal can show what the command line prints, whatever its encoding; files are UTF-8 whatever the locale."""

import io
import os
import subprocess
import sys

import pytest

from ntkgen import cli
from ntkgen.analysis.report import make as report
from ntkgen.cli.progress import progress_bars
from ntkgen.cli.terminal import spell, spelled_streams

# Signs of help, results, errors, paths and progress bars: of mathematics, of other scripts, and bytes that are no text.
SIGNS = "‖E‖ ≤ √λ₁ ± 10⁻² → Kᵀ × η … ━ é 数 \udcff"


class Screen(io.TextIOWrapper):
    """A terminal with an encoding."""

    def __init__(self, encoding, errors="strict", is_terminal=False):
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


def run_on(encoding, monkeypatch, *args):
    out, err = Screen(encoding), Screen(encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return cli.run([str(arg) for arg in args]), out.text(), err.text()


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_every_sign_can_be_written(encoding, monkeypatch):
    out = Screen(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with spelled_streams():
        print(SIGNS, end="")
    shown = {
        "latin-1": "||E|| <= sqrt lambda1 ± 10^-² -> K^T × eta ... - é ? ?",
        "cp1252": "||E|| <= sqrt lambda1 ± 10^-² -> K^T × eta … - é ? ?",
        "ascii": "||E|| <= sqrt lambda1 +- 10^-2 -> K^T x eta ... - e ? ?",
        "utf-8": SIGNS.replace("\udcff", "?"),
    }
    assert out.text() == shown[encoding]
    assert out.errors == "strict"  # as it was


def test_what_the_user_has_set_for_a_stream_stays(monkeypatch):
    out = Screen("ascii", "xmlcharrefreplace")
    monkeypatch.setattr(sys, "stdout", out)
    with spelled_streams():
        print("λ", end="")
    assert out.text() == "&#955;"


def test_a_stream_that_is_closed_or_none_of_pythons_is_left_alone(monkeypatch):
    out = Screen("ascii")
    out.close()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with spelled_streams():
        print("λ", file=sys.stderr)
    assert sys.stderr.getvalue() == "λ\n"


def test_every_sign_of_the_source_has_a_spelling(pytestconfig):
    sources = "".join(path.read_text(encoding="utf-8") for path in (pytestconfig.rootpath / "ntkgen").rglob("*.py"))
    assert {sign for sign in set(sources) if spell(sign) == "?"} <= set("?数\udcff")


def test_commands_print_on_any_terminal(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job.run(job.create(tmp_path / "k.zarr"))
    made = report.Made("<p>‖E‖ × λ".encode(), ({"flow": "‖E‖ ≤ λ"},))
    monkeypatch.setattr(report, "make_report", lambda *_: made)  # its pictures take seconds, and are files
    for args in (
        ["--help"],
        ["compute", "--help"],
        ["analyze", "--help"],
        ["info", "k.zarr"],
        ["analyze", "spectrum", "k.zarr"],
        ["report", "k.zarr"],
        ["compute", "--models", "logistic", "--epochs", "0", "--subsample", "2", "--explain"],
    ):
        code, out, err = run_on("latin-1", monkeypatch, *args)
        assert (code, err) == (0, ""), args
        assert out
    code, _, err = run_on("latin-1", monkeypatch, "info", "‖.zarr")
    assert code == 2
    assert "no kernel store at ||.zarr" in err
    assert (tmp_path / "report.html").read_bytes() == made.page


def test_progress_bars_are_drawn_on_any_terminal(monkeypatch):
    err = Screen("latin-1", is_terminal=True)
    monkeypatch.setattr(sys, "stderr", err)
    with spelled_streams(), progress_bars("‖数‖", quiet=False) as report:
        report("tiles", 1, 2)
        report("tiles", 2, 2, "Σ")
    assert "||?|| tiles" in err.text()
    assert "Sigma" in err.text()


def test_a_process_prints_help_and_errors_on_any_terminal():
    script = "from ntkgen import cli; cli.run(['--help']); cli.main(['info', '‖'])"
    environ = {**os.environ, "PYTHONIOENCODING": "cp1252", "LANG": "C"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environ, check=False)
    assert done.returncode == 2
    assert b"K = J J" in done.stdout
    assert b"There is no kernel store at" in done.stderr
    assert b"Traceback" not in done.stderr
