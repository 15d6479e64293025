"""Statistics of a step, scores of a stream, and their tables."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from ntkgen.continual.metrics.streaming import SCORES, scores
from ntkgen.continual.streaming.logs import read_published_log
from ntkgen.continual.streaming.measures import THINNED
from ntkgen.continual.streaming.statistics import (
    inactive_units,
    plasticity,
    thinned_measures,
    weight_rank,
    weights_of,
)
from ntkgen.continual.streaming.summary import Row, best_row, table
from ntkgen.errors import DataError


def test_plasticity_is_a_part_of_the_loss():
    before = torch.tensor([2.0, 2.0, 1.0, 0.0, 0.5, 1e-12])
    after = torch.tensor([2.0, 0.0, 4.0, 0.0, 0.25, 1e-12])
    found = plasticity(before, after)
    torch.testing.assert_close(found[:5], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]))
    assert ((found >= 0) & (found <= 1)).all()
    for diverged in (math.nan, math.inf):
        assert plasticity(torch.tensor(diverged), torch.tensor(1.0)).isnan()


def test_inactive_units_count_exact_zeros():
    rectified = [torch.tensor([[0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor([[0.0], [0.0]])]
    assert inactive_units(rectified).tolist() == pytest.approx([3 / 5, 1 / 5])
    assert inactive_units([]).isnan()


def test_ranks_of_weights_by_hand():
    linear = torch.zeros(2, 3, 4)
    linear[0, 0] = 1  # rank 1 of 3
    linear[1, :, :3] = torch.eye(3)
    kernels = torch.zeros(2, 2, 1, 5, 5)
    kernels[0, 0, 0] = torch.eye(5)  # ranks 5 and 1, mean 3
    kernels[0, 1, 0] = 1
    kernels[1] = torch.eye(5)
    assert weight_rank([linear, kernels]).tolist() == pytest.approx([(1 + 3) / (3 + 5), 1.0])
    linear[1, 0, 0] = math.nan
    assert weight_rank([linear, kernels])[1].isnan()
    assert not weight_rank([linear, kernels])[0].isnan()


def test_norms_use_weights_alone():
    parameters = {"0.weight": torch.tensor([[[3.0, -4.0]]]), "0.bias": torch.tensor([[100.0]])}
    grads = {"0.weight": torch.tensor([[[0.0, 2.0]]]), "0.bias": torch.tensor([[7.0]])}
    found = thinned_measures(weights_of(parameters), weights_of(grads))
    values = {name: float(found[name]) for name in THINNED}
    assert values == {
        "weight_rank": 1.0, "weight_l2": 5.0, "weight_l1": 7.0, "grad_l2": 2.0, "grad_l1": 2.0, "grad_l0": 0.5,
    }  # fmt: skip


def test_norms_of_a_diverged_network_are_not_numbers():
    weights, grads = [torch.ones(2, 1, 2)], [torch.tensor([[[1.0, 0.0]], [[math.nan, 0.0]]])]
    found = thinned_measures(weights, grads)["grad_l0"]
    assert found[0] == 0.5
    assert found[1].isnan()


LOSSES = np.array([[2.0, 3.0], [1.0, 1.0], [1.5, 2.0]])
ACCURACIES = np.array([[0.2, 0.1], [0.6, 0.7], [0.5, 0.3]])
PLASTICITY = np.array([[0.5, 0.5], [0.4, 0.3], [0.3, 0.4]])


def test_scores_by_hand():
    found = scores(LOSSES, ACCURACIES, PLASTICITY)
    expected = {
        "average_accuracy": [1.3 / 3, 1.1 / 3],
        "late_accuracy": [1.3 / 3, 1.1 / 3],
        "average_plasticity": [0.4, 0.4],
        "lipschitz": [1.0, 2.0],
        "forgetting": [-0.3, -0.2],
        "largest_drop": [0.1, 0.4],
        "plasticity_change": [0.2, 0.1],
    }
    for name in SCORES:
        np.testing.assert_allclose(getattr(found, name), expected[name], err_msg=name)
    late = scores(np.zeros((25, 1)), np.arange(25.0)[:, None], np.zeros((25, 1))).late_accuracy
    assert late.tolist() == [14.5]  # of the last 20 tasks
    assert np.isnan(scores(LOSSES[:1], ACCURACIES[:1], PLASTICITY[:1]).lipschitz).all()


def test_tables_have_means_and_standard_errors():
    row = Row("usgd", scores(LOSSES, ACCURACIES, PLASTICITY))
    error = np.std([1.3 / 3, 1.1 / 3], ddof=1) / math.sqrt(2)
    assert row.standard_error("average_accuracy") == pytest.approx(error)
    text, markdown = table([row]), table([row], "markdown")
    assert f"0.4000 ± {error:.4f}" in text[1]
    assert "accuracy" in text[0]
    assert markdown[1].startswith("| ----")
    assert [cell.strip() for cell in markdown[2].split("|")][1:3] == ["usgd", f"0.4000 ± {error:.4f}"]
    (found,) = csv.DictReader(table([row], "csv"))
    assert float(found["lipschitz"]) == 1.5
    assert float(found["average_accuracy_standard_error"]) == pytest.approx(error)


def test_a_diverged_network_is_never_the_best():
    good = Row("good", scores(LOSSES, ACCURACIES, PLASTICITY))
    better = Row("better", scores(LOSSES, ACCURACIES + 0.1, PLASTICITY))
    diverged = Row("diverged", scores(np.full((3, 2), np.nan), np.full((3, 2), np.nan), PLASTICITY))
    assert best_row([diverged, good, better]) is better
    assert best_row([diverged, good], "lipschitz") is good
    assert best_row([diverged]) is diverged
    assert "diverged" in table([diverged])[1]


def test_published_records_are_read(tmp_path):
    values = {
        "losses": [2.0, 1.0, 1.5], "accuracies": [0.2, 0.6, 0.5], "plasticity_per_task": [0.5, 0.4, 0.3],
        "n_dead_units_per_task": [0.1, 0.2, 0.3], "learner": "usgd", "seed": 19, "task": "label_permuted_cifar10_stats",
    }  # fmt: skip
    path = tmp_path / "19.json"
    path.write_text(json.dumps(values))
    found = read_published_log(path)
    assert dict(found.sizes) == {"bin": 3, "combination": 1, "seed": 1}
    assert found.samples.values.tolist() == [1, 2501, 5001]
    assert found.seed.values.tolist() == [19]
    measures = (found[name].isel(combination=0).values for name in ("loss", "accuracy", "plasticity"))
    row = Row(found.attrs["learner"], scores(*measures))
    assert row.mean("average_accuracy") == pytest.approx(1.3 / 3)
    assert row.mean("forgetting") == pytest.approx(-0.3)
    path.write_text(json.dumps({**values, "accuracies": [0.2, 0.6]}))
    with pytest.raises(DataError, match="ValueError"):
        read_published_log(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="losses"):
        read_published_log(path)
