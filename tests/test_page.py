"""The page on a kernel: valid, self-contained, true; what it looks like in a browser; and `ntkgen report`."""

import collections
import dataclasses
import importlib
import itertools
import json
import re
import shlex
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from cases import chosen, files_of
from filled import PROVENANCE, answer_of, drawn, fill_store, filled

from ntkgen.analysis.answers import Answers, compare_all, gather
from ntkgen.analysis.comparison import CompareSettings, compare
from ntkgen.analysis.determinant import LogdetAnswer
from ntkgen.analysis.eigenvalue_density import DensityAnswer
from ntkgen.analysis.eigenvalues import SpectrumAnswer
from ntkgen.analysis.extrapolation import ExtrapolateAnswer
from ntkgen.analysis.gradient_flow import FlowAnswer
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.regression import RegressAnswer
from ntkgen.analysis.report import make as report
from ntkgen.analysis.report import reproduce, sections
from ntkgen.analysis.report.content import TALL, Code, Facts, Paragraph, Section, Table
from ntkgen.analysis.report.make import make_report
from ntkgen.analysis.report.page import write_page
from ntkgen.analysis.report.sections import comparison
from ntkgen.analysis.results import Kept
from ntkgen.store.opening import open_store

LABELS = np.array([2, 0, 1, 0, 2, 1, 1])
MEMORY = 10**12
CERTIFICATE = {
    "num_probes": 10, "num_pairs": 16, "seed": 5, "kernel_norm": 1.0, "errors": [
        {"dtype": "float64", "error": 1.25e-3, "bound": 2.5e-3, "relative_error": 1e-5, "relative_bound": 2e-5,
         "max_pair_error": 1e-6, "block_errors": [], "suspicious": []}]}  # fmt: skip
NASTY = "<script>alert('x')</script>&\"quoted\""
VOID = {"meta", "link", "img", "br"}


class Checked(HTMLParser):
    """Reads a page strictly: every tag closed in its turn; collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def written(*body):
    """Write a page of one section, and return what is between its heading and its end."""
    text = write_page("t", [], [Section("s", body)]).decode()
    return re.search(r"<h2[^>]*>s</h2>(.*)</section>", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two stores of the same samples. The name of one must be escaped in HTML."""
    folder = tmp_path_factory.mktemp("page")
    provenance = {**PROVENANCE, "model": NASTY}
    one, K = fill_store(
        folder / "one.zarr", labels=LABELS, num_outputs=3, provenance=provenance, certificate=CERTIFICATE
    )
    two, _ = fill_store(folder / "two.zarr", K + np.eye(len(K)), labels=LABELS, num_outputs=3)
    return one, two


@pytest.fixture(scope="module")
def single(stored):
    return make_report([open_matrix(stored[0])], MEMORY).page.decode()


@pytest.fixture(scope="module")
def double(stored):
    """Two kernels without most pictures, which `single` and `whole_double` have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_all", lambda *_: {})
        return make_report([open_matrix(store) for store in stored], MEMORY).page.decode()


@pytest.fixture(scope="module")
def whole_double(stored):
    return make_report([open_matrix(store) for store in stored], MEMORY).page.decode()


@pytest.fixture(params=["single", pytest.param("whole_double", marks=pytest.mark.slow)])
def text(request):
    return request.getfixturevalue(request.param)


# the page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_html(text):
    assert text.startswith("<!DOCTYPE html>")
    found = Checked(text)
    assert found.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in found.all("meta")
    assert "width=device-width" in next(meta["content"] for meta in found.all("meta") if meta.get("name") == "viewport")
    assert [count for count in collections.Counter(found.ids).values() if count > 1] == []
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(later <= sooner + 1 for sooner, later in itertools.pairwise(levels))


def test_the_page_needs_nothing_from_elsewhere(text):
    found = Checked(text)
    for _, attributes in found.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "url(" not in text
    assert "@import" not in text
    policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert len(text) < 4e6


def test_links_lead_to_sections(text):
    found = Checked(text)
    links = [link["href"].removeprefix("#") for link in found.all("a")]
    assert links
    assert set(links) <= set(found.ids)


def test_everything_has_a_name_for_those_who_do_not_see_it(text):
    found = Checked(text)
    assert len(found.all("img")) >= 8
    assert all(len(image["alt"]) > 50 for image in found.all("img"))
    assert all(section["aria-labelledby"] in found.ids for section in found.all("section"))
    assert all(region["aria-label"] for region in found.all("div") if region.get("role") == "region")


def test_what_a_store_says_cannot_become_part_of_the_page(single):
    assert single.count("<script>") == 1
    assert "alert(" in single
    assert NASTY in Checked(single).words


def test_every_section_is_there_and_says_numbers(single, stored):
    found, (store, _) = Checked(single), stored
    titles = (
        "The kernel", "Spectrum", "Log-determinant", "Regression", "Alignment with the labels", "Precision certificate",
        "Provenance", "How to reproduce", "How to cite",
    )  # fmt: skip
    for title in titles:
        assert f">{title}</h2>" in single
    K = open_matrix(store).dense()
    for number in (np.trace(K), np.linalg.norm(K), np.linalg.slogdet(K)[1], np.linalg.slogdet(K)[1] / len(K)):
        assert f"{number:.8g}".replace("-", "−") in found.words
    assert repr(float(np.linalg.eigvalsh(K)[-1]))[:12] in single  # all digits, to sort by
    assert "95 % confidence" in found.words
    assert "0.0025" in found.words
    assert store.manifest.fingerprint in found.words
    assert "arXiv" in found.words


@pytest.mark.slow
def test_several_kernels_are_compared(double):
    words = Checked(double).words
    assert "2 neural tangent kernels" in words
    assert ">Overview</h2>" in double
    assert ">Comparison</h2>" in double
    assert "Centred alignment" in words
    assert ">two.zarr</h2>" in double


def test_kernels_of_other_samples_are_told_not_to_be_comparable(tmp_path, stored):
    other, _ = fill_store(tmp_path / "other.zarr", labels=LABELS[:4], num_outputs=3)
    found, refused = compare_all([open_matrix(stored[0]), open_matrix(other)], MEMORY)
    assert found == []
    assert "are of different rows" in refused[other.name]
    assert "are of different rows" in written(*comparison(found, refused).body)


def test_the_page_says_how_many_eigenvalues_the_lower_precision_loses(tmp_path):
    content = drawn(8, 2)
    values, Q = np.linalg.eigh(content.kernel)
    values[:3] = -1e-3
    lost = dataclasses.replace(content, kernel=(Q * values) @ Q.T, precision="tf32")
    pair = [open_matrix(filled(tmp_path / f"{name}.zarr", each)) for name, each in (("a", content), ("b", lost))]
    answer = compare(*pair, CompareSettings(2, memory_bytes=MEMORY))
    assert answer.cost.not_positive == 3
    body = written(*comparison([answer], {}).body)
    assert "Eigenvalues that are not positive in the lower" in body
    assert re.search(r"not positive in the lower precision</th><td[^>]*>3</td>", body)


@pytest.fixture
def without_pictures(monkeypatch):
    """Leave out what takes longest."""
    monkeypatch.setattr(report, "draw_all", lambda *_: {})


def test_what_is_not_known_is_said_with_the_reason(tmp_path, without_pictures):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.full(4, -1), num_outputs=2, provenance={})
    made = make_report([open_matrix(store)], MEMORY)
    words = Checked(made.page.decode()).words
    assert "has no labels" in words
    assert "ntkgen verify --certify" in words
    assert set(made.lacking[0]) == {"regress", "flow", "align"}


def test_a_page_is_the_same_twice(stored, without_pictures):
    first, second = (make_report([open_matrix(stored[0])], MEMORY).page for _ in range(2))
    assert first == second


def test_tables_keep_all_digits_and_escape_words():
    text = written(Table(("a", "b<"), [(1 / 3, "x"), (None, "<y>")], "n&m"))
    assert 'data-value="0.3333333333333333">0.3333</td>' in text
    assert 'data-value="">–</td>' in text
    assert "b&lt;" in text
    assert "&lt;y&gt;" in text
    assert 'aria-label="n&amp;m"' in text
    assert "tall" in written(Table(("a",), [(number,) for number in range(TALL + 1)], "t"))
    assert "tall" not in written(Table(("a",), [(number,) for number in range(TALL)], "t"))
    assert "−0.5" in written(Facts({"a": -0.5}, "f"))


def test_indices_are_below_the_line_and_words_of_a_store_are_not_read_as_markup():
    text = written(Paragraph("‖E‖_F of ntk_float32 {{ 1 }} <K_rr>", "soft"))
    assert text.strip() == '<p class="soft">‖E‖<sub>F</sub> of ntk_float32 {{ 1 }} &lt;K<sub>rr</sub>&gt;</p>'


def test_code_keeps_its_lines():
    assert "<code>  a &amp;&amp; b\n\n    c\n</code>" in written(Code(["  a && b", "", "    c", ""]))


def test_style_and_script_are_in_the_page_as_they_are(single):
    folder = resources.files("ntkgen.analysis.report")
    for name in ("page.css", "page.js"):
        assert folder.joinpath(name).read_text(encoding="utf-8") in single


# in a browser ---------------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")

# Clicks on the title of each column of each table, and notes what is wrong; the page's own script is then long through.
PROBE = """
<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(event.message));
addEventListener("load", () => {
  const known = (cell) => cell.dataset.value ?? cell.textContent;
  for (const button of document.querySelectorAll("th button")) {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    for (const direction of ["ascending", "descending"]) {
      button.click();
      if (head.getAttribute("aria-sort") !== direction) wrong.push("aria-sort");
      const values = Array.from(body.rows, (row) => known(row.cells[head.cellIndex])).filter((value) => value !== "");
      const numeric = values.every((value) => !Number.isNaN(Number(value)));
      const before = (a, b) => (numeric ? Number(a) <= Number(b) : a.localeCompare(b) <= 0);
      for (let i = 1; i < values.length; i += 1) {
        const [a, b] = direction === "ascending" ? [values[i - 1], values[i]] : [values[i], values[i - 1]];
        if (!before(a, b)) wrong.push(`${button.textContent}: ${a} ${b}`);
      }
    }
  }
  for (const image of document.images) if (!image.complete || !image.naturalWidth) wrong.push("an image is broken");
  const size = `${innerWidth} ${document.documentElement.scrollWidth}`;
  document.body.dataset.probe = JSON.stringify({wrong, size, sorted: document.querySelectorAll("th button").length});
});
</script>
"""


def browse(place, *options):
    """Open a page in a headless browser; return its stdout and what the console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
               f"--user-data-dir={place.parent / 'profile'}", "--enable-logging=stderr", "--v=0"]  # fmt: skip
    done = subprocess.run([*command, *options, place.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_at_every_width_without_a_word_on_the_console(tmp_path, double, width, scheme):
    place = tmp_path / "report.html"
    place.write_text(double.replace("</body>", f"{PROBE}</body>"))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom, console = browse(place, f"--window-size={width},900", "--dump-dom", *dark)
    assert console == []
    probe = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert probe["wrong"] == []
    assert probe["sorted"] >= 20
    inner, scrolled = map(int, probe["size"].split())
    assert scrolled <= inner  # nothing makes the page wider than the screen
    assert inner <= max(width, 500)


@in_browser
def test_the_console_is_listened_to(tmp_path):
    place = tmp_path / "broken.html"
    broken = write_page("t", [], [Section("s", [])]).decode().replace("</body>", "<script>nowhere()</script></body>")
    place.write_text(broken)
    assert len(browse(place, "--dump-dom")[1]) == 1
    place.write_text(broken.replace("nowhere()", "fetch('https://example.org')"))  # which the page's policy forbids
    assert browse(place, "--dump-dom")[1]


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_screenshot_shows_something(tmp_path, single, width):
    place, shot = tmp_path / "report.html", tmp_path / "shot.png"
    place.write_text(single)
    assert browse(place, f"--window-size={width},1600", f"--screenshot={shot}")[1] == []
    pixels = shot.read_bytes()
    assert struct.unpack(">II", pixels[16:24]) == (width, 1600)
    assert len(pixels) > 30_000  # a blank one has some kilobytes


# how to reproduce -----------------------------------------------------------------------------------------------------


COMMANDS = {
    "plain": ["--epochs", "0", "--subsample", "5"],
    "every option": [
        "--epochs", "0", "--subsample", "6", "--shuffle-seed", "3", "--seed", "7", "--output", "index:2",
        "--precision", "float64", "--dtype", "float64", "--layout", "upper", "--tile", "2",
    ],
    "trained": ["--epochs", "1", "--lr", "0.05", "--bs", "128", "--subsample", "4", "--allow-unconverged"],
}  # fmt: skip


@pytest.mark.parametrize("name", chosen(COMMANDS, ["trained"]))
def test_the_command_of_the_page_makes_the_same_bytes_again(run, without_pictures, name):
    """Of a trained network with its checkpoint, which the page asks for."""
    assert run("compute", "--models", "logistic", *COMMANDS[name])[0] == 0
    (place,) = Path("runs").glob("*.zarr")
    recipe = reproduce.recipe_of(open_store(place))
    (command,) = recipe.commands
    assert "\n" not in command
    if name == "trained":
        assert "logistic-digits-seed0.pt" in recipe.notes[0]
        Path("again").mkdir()
        shutil.copy("runs/logistic-digits-seed0.pt", "again")
    assert run(*shlex.split(command)[1:], "--out", "again")[0] == 0
    assert files_of(Path("again") / place.name) == files_of(place)
    run("report", place, "--memory", "1TB")
    assert command in Checked(Path("report.html").read_text()).words


QUESTIONS_ASKED = {
    "spectrum": ["--top", "3"],
    "density": [],
    "logdet": ["--prefixes"],
    "extrapolate": ["--to", "40", "--q", "0", "--burn-in", "1", "--holdout", "0.2", "--shift", "0.5"],
    "regress": ["--shifts", "0.5", "2.0"],
    "flow": ["--times", "0.5", "1.5", "--modes", "7"],
    "align": [],
}
UNUSUAL = {
    "density": ["--bandwidth", "0.3"],
    "logdet": ["--shift", "0.5"],
    "regress": ["--offset", "logits"],
    "flow": ["--loss", "cross-entropy"],
}


@pytest.mark.slow
def test_what_was_asked_otherwise_than_usual_is_not_compared_with_other_kernels(run, tmp_path):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=3)
    for question, options in UNUSUAL.items():
        assert run("analyze", question, store.name, *options)[0] == 0
    found = gather(open_matrix(store))
    assert (found.get(DensityAnswer).bandwidth, found.get(LogdetAnswer).shift) == (0.1, 0.0)
    assert (found.get(RegressAnswer).offset, found.get(FlowAnswer).loss) == ("zero", "squared")
    code, out, err = run("plot", store.name, "--kind", "modes", "flow", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["pictures"]) == 2


def test_the_commands_of_the_page_ask_the_same_again(run, without_pictures, tmp_path):
    """What they find lies beside the store already."""
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=3)
    for question, options in QUESTIONS_ASKED.items():
        assert run("analyze", question, store.name, *options)[0] == 0
    assert run("report", store.name)[0] == 0
    lines = "\n".join(Checked(Path("report.html").read_text()).text).splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith("ntkgen analyze")]
    found = {command.split()[2]: shlex.split(command)[1:] for command in commands}
    assert set(found) == set(QUESTIONS_ASKED)
    for question, command in found.items():
        code, out, _ = run(*command, "--json")
        assert code == 0, command
        assert json.loads(out)["remembered"], command
        assert set(QUESTIONS_ASKED[question]) <= {*command, "--top", "3"}, command


def test_new_answers_have_the_settings_that_the_saved_ones_have(tmp_path):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=3)
    matrix = open_matrix(store)
    new, saved = ({name: kept.asked for name, kept in gather(matrix).found.items()} for _ in range(2))
    assert new == saved
    assert new["flow"]["num_modes"] == matrix.num_rows


def test_a_store_that_says_how_long_it_was_trained_needs_no_checkpoint(tmp_path):
    provenance = {**PROVENANCE, "num_epochs": 30, "target_accuracy": 80.0, "raw_images": True, "against": None}
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, provenance=provenance)
    recipe = reproduce.recipe_of(store)
    assert "--epochs 30 --target-accuracy 80.0" in recipe.commands[0]
    assert "--raw-images" in recipe.commands[0]
    assert "trains the network again" in recipe.notes[0]


def test_words_are_quoted_for_the_shell(tmp_path):
    provenance = {**PROVENANCE, "dataset": "my data.npz"}
    recipe = reproduce.recipe_of(fill_store(tmp_path / "k.zarr", labels=LABELS, provenance=provenance)[0])
    assert "--dataset 'my data.npz'" in recipe.commands[0]
    assert "a file of the user" in recipe.notes[1]


def test_kernels_made_elsewhere_say_how_far_they_are_known(tmp_path):
    called = reproduce.recipe_of(fill_store(tmp_path / "a.zarr", labels=LABELS, provenance={})[0])
    assert "ntkgen.compute(model, x" in called.commands[1]
    imported, _ = fill_store(
        tmp_path / "b.zarr", labels=LABELS, provenance={"imported_from": "k.bin", "quantity": "J Jᵀ"}
    )
    assert reproduce.recipe_of(imported).commands[0].startswith("ntkgen import k.bin --samples 7 --outputs 1")


def test_the_readme_has_the_citation_of_the_pages():
    lines = reproduce.citation()
    program = "\n".join(lines[: lines.index("}") + 1])
    assert f"\n{program}\n" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_citation_names_the_kernel_and_the_paper(stored):
    lines = "\n".join(reproduce.citation(stored[0]))
    assert stored[0].manifest.fingerprint[:16] in lines
    assert "1806.07572" in lines
    assert lines.count("{") == lines.count("}")


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file(run, stored, without_pictures):
    code, out, err = run("report", stored[0].name, "-o", "here/r.html", "--json", "--memory", "1TB")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["report_bytes"] == Path("here/r.html").stat().st_size
    assert [path.name for path in Path("here").iterdir()] == ["r.html"]
    assert result["store"] == stored[0].name
    assert result["lacking"] == {}


def test_the_command_takes_several_kernels(run, stored, without_pictures):
    code, out, _ = run("report", stored[0].name, stored[1].name, "--memory", "1TB")
    assert code == 0
    assert out.splitlines()[-1].startswith("report.html: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.zarr"], "There is nothing at nowhere.zarr: expected a kernel"),
        (["STORE", "-o", "file/r.html"], "Nothing can be written below"),
        (["STORE", "--dtype", "float16"], "has no float16 kernel"),
        ([], "Missing argument 'PATHS...'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, stored, args, message):
    Path("file").write_text("")
    code, out, err = run("report", *[stored[0].name if arg == "STORE" else arg for arg in args])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_kernel_that_is_not_complete_is_refused_or_its_leading_part_taken(run, tmp_path, without_pictures):
    store, _ = fill_store(tmp_path / "k.zarr", labels=LABELS, num_outputs=1, tile_samples=2)
    (tmp_path / "k.zarr/ntk_float64/c/3/3").unlink()
    code, _, err = run("report", store.name)
    assert code == 2
    assert "is not complete" in err
    assert run("report", store.name, "--allow-partial", "--memory", "1TB")[0] == 0
    assert "the first 6 of 7 rows" in Checked(Path("report.html").read_text()).words


@pytest.mark.parametrize(("smallest", "is_noise"), [(0.1, True), (0.9, False)])
def test_a_condition_number_of_noise_is_called_so(smallest, is_noise):
    answer = answer_of(SpectrumAnswer, condition=10.0, smallest=smallest, error_norm=0.5)
    assert [("below the bound" in part.text) for part in sections._noise(answer)] == [True] * is_noise
    line = importlib.import_module("ntkgen.cli.analyze.spectrum")._condition(answer)
    assert ("the stored numbers only" in line) == is_noise


def test_an_undetermined_extrapolation_is_called_so(tmp_path):
    store, _ = fill_store(tmp_path / "k.zarr", labels=np.arange(8) % 2)
    law = answer_of(
        ExtrapolateAnswer, store="k.zarr", to=100, logdet=-5.0, holdout_logdet=9.0, fitted_to=8, holdout_from=6, nu=1.0
    )
    found = Answers(open_matrix(store), {"extrapolate": Kept(law, {})})
    assert any("not determined" in part.text for part in sections._law(found) if isinstance(part, Paragraph))
