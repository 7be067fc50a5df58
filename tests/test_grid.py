"""The nodes a run visits."""

import numpy as np
import pytest

from ddim_ode import Grid, NoiseSchedule, grids

LINEAR = NoiseSchedule.linear()


@pytest.mark.parametrize(
    ("name", "steps"), [(n, s) for n in grids() for s in (1, 2, 7, 50) if (n, s) != ("released-quadratic", 1)]
)
def test_every_rule_falls_to_zero_and_reverses_to_the_bit(name, steps):
    grid = Grid.make(name, LINEAR, steps)
    assert grid.sigmas[-1] == 0.0
    assert np.all(np.diff(grid.sigmas) < 0)
    assert not grid.encoding
    back = grid.reversed()
    assert back.encoding
    assert np.array_equal(back.sigmas[::-1], grid.sigmas)
    assert back.reversed() == grid
    if name != "released-quadratic":
        assert grid.steps == steps
        assert grid.sigmas[0] == LINEAR.sigma_max


@pytest.mark.parametrize("schedule", [NoiseSchedule.continuous(), NoiseSchedule.edm(), NoiseSchedule.cosine()])
@pytest.mark.parametrize("name", sorted(set(grids()) - {"released-quadratic"}))
def test_every_rule_on_other_schedules(schedule, name):
    grid = Grid.make(name, schedule, 10)
    assert grid.steps == 10
    assert grid.sigmas[0] == schedule.sigma_max


def test_the_papers_tau():
    labels = Grid.make("linear", LINEAR, 10).labels[:-1] + 1
    np.testing.assert_allclose(labels, np.arange(1000, 0, -100), atol=1e-9)
    labels = Grid.make("quadratic", LINEAR, 10).labels[:-1] + 1
    np.testing.assert_allclose(labels, [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10], atol=1e-9)


def test_quadratic_tau_stay_distinct_and_reach_T():
    for steps in (50, 100, 999, 1000):
        tau = Grid.make("quadratic", LINEAR, steps).labels[:-1] + 1
        assert np.all(np.diff(tau) < -0.5)
        assert tau[0] == pytest.approx(1000)


def test_the_released_rule_is_the_authors():
    # seq = np.linspace(0, np.sqrt(T * 0.8), S) ** 2, cut to integers, as 0-based labels; a repeated label is a step
    # of length zero there and no step here
    seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 50) ** 2]
    labels = Grid.make("released-quadratic", LINEAR, 50).labels[:-1]
    np.testing.assert_allclose(labels[::-1], sorted(set(seq)), atol=1e-9)


def test_even_spacings():
    def even(values):
        return np.ptp(np.diff(values)) < 1e-9 * np.ptp(values)

    assert even(np.log(Grid.make("log", LINEAR, 9).sigmas[:-1]))
    assert even(Grid.make("karras", LINEAR, 9, rho=5.0).sigmas[:-1] ** 0.2)
    assert even(np.arctan(Grid.make("arctan", LINEAR, 9, c=0.3).sigmas / 0.3))
    assert even(np.arcsinh(Grid.make("asinh", LINEAR, 9, c=0.3).sigmas / 0.3))
    assert even(LINEAR.t(Grid.make("t", LINEAR, 9).sigmas))


def test_equal_numbers_for_equal_schedules_are_equal_grids():
    one, other = (Grid.make("karras", NoiseSchedule.linear(), 5) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Grid.explicit(one.sigmas, NoiseSchedule.edm(0.002, 200.0))
    assert one != one.reversed()


def test_grids_are_immutable():
    grid = Grid.explicit([3.0, 2.0, 0.5], LINEAR)
    with pytest.raises(ValueError, match="read-only"):
        grid.sigmas[0] = 1.0
    with pytest.raises(AttributeError):
        grid.name = "other"


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([3.0, 2.0, 2.0, 0.0], r"sigmas\[1\] = 2 is followed by sigmas\[2\] = 2"),
        ([3.0, 1.0, 2.0, 0.0], r"sigmas\[1\] = 1 is followed by"),
        ([1.0], "at least two"),
        ([1.0, np.nan], "finite"),
        ([1.0, -1.0], "negative"),
        ([200.0, 0.0], "sigma_max"),
        ([LINEAR.sigma_max * (1 + 5e-7), LINEAR.sigma_max * (1 + 1e-7), 0.0], "strictly"),
    ],
)
def test_bad_sigmas_are_refused(sigmas, says):
    with pytest.raises(ValueError, match=says):
        Grid.explicit(sigmas, LINEAR)


@pytest.mark.parametrize(
    ("name", "steps", "options", "says"),
    [
        ("karas", 10, {}, "did you mean karras"),
        ("linear", 0, {}, "at least 1"),
        ("linear", 2.5, {}, "whole number"),
        ("linear", 1001, {}, "trained at 1000"),
        ("karras", 10, {"rho": 0.0}, "rho must be a positive number"),
        ("arctan", 10, {"c": -1.0}, "c must be a positive number"),
        ("log", 10, {"rho": 7.0}, "does not take the option 'rho': it has none"),
        ("karras", 10, {"c": 7.0}, "it has rho"),
        ("karras", 10, {"rho": "7"}, "rho must be a positive number, but got '7'"),
        ("asinh", 10, {"c": np.nan}, "c must be a positive number"),
        ("released-quadratic", 1, {}, "steps >= 2"),
    ],
)
def test_bad_rules_are_refused(name, steps, options, says):
    with pytest.raises(ValueError, match=says):
        Grid.make(name, LINEAR, steps, **options)


def test_released_rule_needs_trained_steps():
    with pytest.raises(ValueError, match="continuous"):
        Grid.make("released-quadratic", NoiseSchedule.edm(), 10)
