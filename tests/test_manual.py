"""The README and the manual: every command line and every Python snippet in them is run, or at least parsed.

A comment above a block says why it is not run, that it is a file for the following blocks, or that it is slow:
``<!-- not run: needs CIFAR-10 -->``, ``<!-- file: mylab/nets.py -->``, ``<!-- slow: trains a network -->``.
"""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from filled import drawn, filled, rectangle

from ntkgen import cli, manual

ROOT = Path(__file__).parents[1]
TEXTS = {"README": ROOT / "README.md", **{name: ROOT / f"ntkgen/manual/{name}.md" for name in manual.NAMES}}
README_BYTES = 8192

MARKERS = ("not run", "file", "slow")
# Programs of others, whose options are theirs.
OTHERS = {"pip", "dask"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block, and what the comment above it says."""

    text: str
    language: str
    marker: str  # one of MARKERS, or empty: it is run
    argument: str
    line: int

    @property
    def commands(self):
        """Its command lines, as words; what is behind a # is a comment."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in re.split(r"&&|&\s*$", line)]
        return [words for part in parts if (words := shlex.split(part, comments=True))]


def blocks_of(text):
    """Find the fenced blocks of a page."""
    pattern = re.compile(r"(?:^<!-- ([\w ]+): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        CodeBlock(found[4], found[3], found[1] or "", found[2] or "", text[: found.start(4)].count("\n") + 1)
        for found in pattern.finditer(text)
    ]


BLOCKS = {name: blocks_of(path.read_text(encoding="utf-8")) for name, path in TEXTS.items()}
CHEAP = [
    name for name, blocks in BLOCKS.items() if any(each.marker == "" and each.language != "text" for each in blocks)
]
SLOW = [name for name, blocks in BLOCKS.items() if any(each.marker == "slow" for each in blocks)]


# the texts ------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_has_the_two_commands():
    readme = TEXTS["README"].read_bytes()
    assert len(readme) <= README_BYTES
    lines = readme.decode().splitlines()
    assert "pip install uv && uv run pytest" in lines
    assert "pip install uv && uv run ntkgen compute --models lenet --dataset digits --subsample 500" in lines


def test_every_page_is_listed_and_every_listed_page_is_there():
    assert {path.stem for path in (ROOT / "ntkgen/manual").glob("*.md")} == set(manual.NAMES)
    listed = re.findall(r"^\| `([a-z-]+)` \|", TEXTS["README"].read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(manual.NAMES)


def test_every_page_that_is_pointed_to_is_there():
    files = [
        *TEXTS.values(),
        *ROOT.glob("ntkgen/**/*.py"),
        *ROOT.glob("scripts/**/*.py"),
        *ROOT.glob("scripts/*.sh"),
        ROOT / "scripts" / "check",
    ]
    named = {
        (path.name, name)
        for path in files
        for name in re.findall(r"ntkgen manual ([a-z][a-z-]*)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > len(manual.NAMES) // 2
    assert {each for each in named if each[1] not in manual.NAMES} == set()


def test_the_source_tree_is_the_one_that_is_there():
    (tree,) = (block for block in BLOCKS["contributing"] if block.language == "text")
    folders, listed = [], set()
    for line in tree.text.splitlines():
        depth, path = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], path]
        listed.add("".join(folders))
    assert [path for path in sorted(listed) if not (ROOT / path).exists()] == []
    told = {path for path in listed if path.endswith("/") and any(each.startswith(path) for each in listed - {path})}
    there = {
        f"{folder}{path.name}{'/' * path.is_dir()}"
        for folder in told - {"tests/"}
        for path in (ROOT / folder).iterdir()
        if path.name[0] not in "._" and path.name != "py.typed" and (path.is_file() or any(path.glob("*.py")))
    }
    assert there - listed == set()


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_is_fenced_and_parses(name):
    text = TEXTS[name].read_text(encoding="utf-8")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in outside.splitlines() if line.startswith("    ")] == []
    assert text.count("\n```") == 2 * len(BLOCKS[name])
    assert len(re.findall(r"^<!-- ", text, re.MULTILINE)) == sum(each.marker != "" for each in BLOCKS[name])
    for block in BLOCKS[name]:
        assert block.language in {"sh", "python", "text"}, block
        assert block.marker in {"", *MARKERS}, block
        if block.language == "python":
            compile(block.text, f"{name}:{block.line}", "exec")
        elif block.language == "sh":
            for words in block.commands:
                require_parsed(words, may_be_others=block.marker != "")


def require_parsed(words, *, may_be_others):
    """Parse a command line: one of ntkgen's as click does it, of a script its options, of others nothing."""
    match words:
        case ["ntkgen", *args] | ["uv", "run", "ntkgen", *args]:
            require_ntkgen(args)
        case ["python", script, *args] | ["sbatch", _, script, *args]:
            require_script(script, args)
        case [script, *args] if script.startswith("scripts/"):
            require_script(script, args)
        case ["uv", "run", "pytest", *args]:
            assert args in ([], ["-m", "slow"])
        case _:
            assert words[0] in OTHERS, words
    assert may_be_others or "ntkgen" in words[:3], words


def require_ntkgen(args):
    command, args = cli.cli, list(args)
    while isinstance(command, click.Group) and args:
        name = args.pop(0)
        command = command.get_command(click.Context(command), name)
        assert command is not None, name
    command.make_context("ntkgen", args).close()


def require_script(script, args):
    """Require that a script is there and names these options; what it passes on is an `ntkgen compute`."""
    own = args
    if "--models" in args and script.startswith("scripts/slurm"):
        split = args.index("--models")
        own = [arg for arg in args[:split] if arg != "--"]
        require_ntkgen(["compute", *args[split:]])
    source = (ROOT / script).read_text(encoding="utf-8")
    assert [arg for arg in own if arg.startswith("--") and arg.partition("=")[0] not in source] == []


# what they say, done --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The stores that the pages name: of one triangle, of another network, and with test samples."""
    folder = tmp_path_factory.mktemp("stores")
    content = drawn(24, 4, dtypes=("float32", "float64"))
    filled(folder / "K.zarr", content)
    filled(folder / "later.zarr", drawn(24, 4, seed=0, parameters="77ab"))
    filled(folder / "K-test.zarr", rectangle(content))
    return folder


def link_stores(stores, folder, names):
    """Copy stores into a folder under the names that a page gives them."""
    import shutil

    for name, source in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(stores / source, folder / name)


@pytest.fixture
def follow(stores, tmp_path, monkeypatch, run):
    """Do what a page says, in one process: its files, commands and snippets, one after the other."""

    def follow_page(page, markers):
        link_stores(stores, tmp_path, {path.name: path.name for path in stores.iterdir()})
        if "slow" not in markers:  # which compute it
            link_stores(stores, tmp_path, {"runs/lenet-digits-seed0-n500.zarr": "K.zarr"})
        names = {"__name__": "manual"}
        for block in BLOCKS[page]:
            where = f"{page}, line {block.line}"
            if block.marker == "file":
                Path(block.argument).parent.mkdir(exist_ok=True)
                Path(block.argument).write_text(block.text, encoding="utf-8")
            elif block.marker in markers and block.language == "python":
                exec(compile(block.text, where, "exec"), names)
            elif block.marker in markers and block.language == "sh":
                for words in block.commands:
                    if "ntkgen" in words:  # and not `pip install uv`
                        code, _, err = run(*words[words.index("ntkgen") + 1 :])
                        assert code == 0, f"{where}: {shlex.join(words)}: {err}"

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield follow_page


@pytest.mark.parametrize("page", CHEAP)
def test_what_a_page_says_can_be_done(page, follow):
    follow(page, {""})


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_what_takes_longer_can_be_done_too(page, follow):
    follow(page, {"", "slow"})


# the command ----------------------------------------------------------------------------------------------------------


def test_the_pages_are_listed(run):
    code, out, _ = run("manual")
    assert code == 0
    assert "ntkgen manual PAGE" in out
    assert all(f"\n  {each.name} " in out and each.summary in out for each in manual.pages())
    assert run("manual", "--list") == (0, "".join(f"{name}\n" for name in manual.NAMES), "")
    listed = [json.loads(line) for line in run("manual", "--json")[1].splitlines()]
    assert [each["page"] for each in listed] == list(manual.NAMES)
    assert all(set(each) == {"page", "title", "summary"} and all(each.values()) for each in listed)


def test_a_page_is_plain_text_where_there_is_no_terminal(run):
    code, out, err = run("manual", "workers")
    assert (code, err) == (0, "")
    assert out.startswith("# Workers and clusters\n")
    assert "```sh\nntkgen compute" in out
    assert "<!--" not in out
    shown = json.loads(run("manual", "workers", "--json")[1])
    assert (shown["page"], shown["text"]) == ("workers", out)


def test_a_page_is_laid_out_in_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    code, out, err = run("manual", "accuracy")
    assert (code, err) == (0, "")
    assert "Errors on any machine" in out
    assert not any(sign in out for sign in ("```", "## ", "<!--", "|---"))


def test_no_table_is_cut_in_a_terminal_of_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True)
    for each in manual.pages():
        out = run("manual", each.name)[1]
        assert out.count("…") == each.text.count("…"), each.name
        assert "|--" not in out, each.name


def test_every_page_shows_a_title_and_one_sentence_first():
    for each in manual.pages():
        assert each.text.startswith("# ")
        assert each.summary.endswith(".")
        assert not each.summary.startswith("#")


@pytest.mark.parametrize("args", [["acuracy"], ["--list", "accuracy"], ["speed", "accuracy"]], ids=" ".join)
def test_a_wrong_page_is_one_line(run, args):
    code, out, err = run("manual", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "accuracy" in err


def test_the_command_needs_neither_torch_nor_zarr():
    script = textwrap.dedent("""
        import sys, types
        import ntkgen
        # the other commands are left out: what they import is their own matter
        sys.modules["ntkgen.cli"] = package = types.ModuleType("ntkgen.cli")
        package.__path__ = [f"{ntkgen.__path__[0]}/cli"]
        from ntkgen.cli.manual import manual
        manual(["accuracy"], standalone_mode=False)
        sys.exit(bool({"torch", "zarr", "numpy"} & set(sys.modules)))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# Accuracy")
