"""Settings of streams: defaults, names, and what is refused."""

import json

import pytest

from ntkgen.cli import run as command
from ntkgen.continual.optim.names import NAMES
from ntkgen.continual.streaming.settings import OTHER_NAMES, StreamingSettings, without_defaults

LINE = ("cl-run", "--stream", "label-permuted", "--samples", "4", "--samples-per-task", "2", "-q")


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_a_record_has_the_value_of_every_option_of_its_learner(method, compat):
    settings = StreamingSettings(method=method, compat=compat)
    learner, values = NAMES[method], settings.to_json()
    expected = {**learner.defaults, **(learner.quirks if compat else {})}
    expected.pop("published", None)
    assert settings.combinations == [expected]
    assert {name: values[OTHER_NAMES.get(name, name)] for name in expected} == expected
    assert (values["samples_per_task"], values["compounding"]) == (2500, True)
    assert StreamingSettings.from_json(values) == settings


def test_a_record_without_defaults_is_the_same_run():
    settings = StreamingSettings(method="usgd", sigma=(0.1, 0.2), stream="input-permuted")
    older = {**settings.to_json(), "beta_utility": None, "learning_rate": None, "samples_per_task": None}
    assert StreamingSettings.from_json(older) == settings
    assert settings.samples_per_task == 5000


def test_another_learner_takes_the_place_of_that_of_a_record(tmp_path, capsys):
    values = StreamingSettings(method="adam", num_samples=4, stats_every=9).to_json()
    (tmp_path / "config.json").write_text(json.dumps({"settings": values, "facts": {}}))
    line = ["cl-run", "--config", str(tmp_path / "config.json"), "--method", "pgd", "--stream", "input-permuted"]
    assert command([*line, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert (found["learning_rate"], found["sigma"], found["samples_per_task"]) == (0.01, 0.005, 5000)
    assert (found["beta1"], found["stats_every"]) == (None, 9)
    written = {"method": "adam", "learning_rate": 0.001}
    assert without_defaults(written) == written
