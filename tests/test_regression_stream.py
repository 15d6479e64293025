"""Slowly changing regression: the stream of a seed is a function of the position, and its targets are as defined."""

import numpy as np
import pytest

from ntkgen.continual.streams.regression import BLOCK, RegressionStreamSettings, SlowRegression
from ntkgen.errors import InputError, UnknownNameError


def stream_of(seed=0, **settings):
    return SlowRegression(RegressionStreamSettings(**settings), seed)


# inputs ---------------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_seed_and_its_position_alone():
    whole = stream_of(period=700).samples(0, 3 * BLOCK)
    for start, stop in ((0, 1), (BLOCK - 1, BLOCK + 1), (1234, 2871), (2 * BLOCK, 3 * BLOCK)):
        part = stream_of(period=700).samples(start, stop)
        for values, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(values, expected[start:stop])
    assert not np.array_equal(stream_of(1, period=700).inputs(0, 50), whole[0][:50])


def test_inputs_are_bits_and_a_constant_one():
    inputs = stream_of().inputs(0, 5000)
    assert inputs.shape == (5000, 21)
    assert set(np.unique(inputs)) == {0, 1}
    assert (inputs[:, -1] == 1).all()
    assert inputs[:, 15:20].mean(0) == pytest.approx(np.full(5, 0.5), abs=0.05)  # seven standard deviations


def test_one_slow_bit_is_flipped_after_each_period():
    slow = stream_of(period=300).inputs(0, 6000)[:, :15]
    steps = np.abs(np.diff(slow, axis=0)).sum(1)
    assert (np.flatnonzero(steps) + 1).tolist() == list(range(300, 6000, 300))
    assert set(steps[steps > 0]) == {1}
    assert len({int(np.abs(slow[at] - slow[at - 1]).argmax()) for at in range(300, 6000, 300)}) > 5


def test_all_slow_bits_may_be_drawn_anew_after_each_period():
    slow = stream_of(period=300, change="redraw").inputs(0, 6000)[:, :15]
    steps = np.abs(np.diff(slow, axis=0)).sum(1)
    assert set(np.flatnonzero(steps) + 1) <= set(range(300, 6000, 300))
    assert 3 < steps[299::300].mean() < 12  # 7.5 of 15 on average


def test_a_stream_without_slow_or_without_fast_bits():
    assert stream_of(slow_bits=0).inputs(9_999, 10_001).shape == (2, 21)
    inputs = stream_of(slow_bits=20, period=50).inputs(0, 100)
    assert len(np.unique(inputs, axis=0)) == 2


# targets --------------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """Three bits and the constant, β = 0.6: a unit is 1 if more than 2.4 of 4 inputs agree with its weights."""
    stream = stream_of(num_inputs=3, slow_bits=1, target_units=2, agreement=0.6)
    stream.incoming[...] = np.array([[1, -1], [1, 1], [-1, -1], [1, -1]])
    stream.outgoing[...], stream.offset[...] = (1, -1), 1
    stream.thresholds[...] = (2.4 - 1, 2.4 - 3)
    inputs = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]], np.float32)
    # agreeing with the first unit: 4, 3, 1, 3; with the second: 2, 1, 1, 3
    assert stream.targets(inputs).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_targets_count_the_inputs_that_agree_with_the_weights(seed):
    stream = stream_of(seed)
    inputs, targets = stream.samples(0, 200)
    agreeing = (inputs[:, :, None] == (stream.incoming > 0)).sum(1)
    expected = stream.offset[0] + (agreeing > 0.7 * 21) @ stream.outgoing
    np.testing.assert_array_equal(targets, expected)


def test_the_target_function_has_as_many_units_with_weights_of_both_signs():
    stream = stream_of(target_units=100)
    assert stream.incoming.shape == (21, 100)
    for weights in (stream.incoming, stream.outgoing, stream.offset):
        assert set(np.unique(np.abs(weights))) == {1}
    assert 0.4 < (stream.incoming > 0).mean() < 0.6
    assert set(stream.outgoing) == {-1, 1}


def test_the_published_thresholds_silence_units_with_a_negative_weight_of_the_constant():
    stream = stream_of(thresholds="published", slow_bits=0)
    is_on = (stream.inputs(0, 20_000) @ stream.incoming > stream.thresholds).mean(0)
    # P(Bin(20, ½) ≥ 14) = 0.058 and P(Bin(20, ½) ≥ 17) = 0.0013
    assert is_on[stream.incoming[-1] > 0].mean() == pytest.approx(0.0577, abs=0.003)
    assert is_on[stream.incoming[-1] < 0].mean() == pytest.approx(0.0013, abs=0.0005)


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"slow_bits": 21}, {"slow_bits": -1}, {"agreement": 70}])
def test_a_stream_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        RegressionStreamSettings(**wrong)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean flip-one"):
        RegressionStreamSettings(change="flip_one")
    with pytest.raises(UnknownNameError, match="Known: counted, published"):
        RegressionStreamSettings(thresholds="paper")
