"""σ(t), its inverse and the labels."""

import json

import numpy as np
import pytest
import torch

from ddim_ode import NoiseSchedule

DISCRETE = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "short": NoiseSchedule.linear(5, 0.1, 0.5),
    "float32 table": NoiseSchedule.from_alphas_cumprod(NoiseSchedule.linear().alphas_cumprod.astype(np.float32)),
    "kinked table": NoiseSchedule.from_alphas_cumprod(np.cumprod(np.where(np.arange(40) % 10 == 0, 0.5, 0.999))),
}
ALL = DISCRETE | {"continuous": NoiseSchedule.continuous(), "edm": NoiseSchedule.edm(), "flow": NoiseSchedule.flow()}


def test_the_papers_ends():
    schedule = NoiseSchedule.linear()
    assert schedule.sigma(1) == pytest.approx(0.0100005, abs=5e-8)
    assert schedule.sigma(1000) == pytest.approx(157.407, abs=5e-4)
    assert schedule.sigma(0) == 0.0
    assert schedule.alpha(0) == 1.0


def test_linear_is_the_product_of_its_betas():
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(NoiseSchedule.linear().alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(NoiseSchedule.linear().betas, betas, rtol=1e-9)


@pytest.mark.parametrize("name", DISCRETE)
def test_exact_at_the_nodes(name):
    schedule = DISCRETE[name]
    nodes = np.arange(1, schedule.T + 1)
    alphas = schedule.alphas_cumprod
    np.testing.assert_allclose(
        schedule.sigma(nodes), np.sqrt((1 - alphas) / alphas), rtol=1e-12 + 2e-16 / (1 - alphas[0])
    )
    np.testing.assert_allclose(schedule.t(schedule.sigma(nodes)), nodes, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_inverse_between_the_nodes(name):
    schedule = ALL[name]
    t = np.linspace(0.0, schedule.T, 20_011)
    sigma = schedule.sigma(t)
    assert np.all(np.diff(sigma) > 0.0)
    np.testing.assert_allclose(schedule.t(sigma), t, atol=1e-10 * schedule.T)


@pytest.mark.parametrize("name", ALL)
def test_inverse_from_the_other_side(name):
    """Below the first trained level too, where a table says nothing."""
    schedule = ALL[name]
    sigma = schedule.sigma_max * np.geomspace(1e-9, 1.0, 4001)
    np.testing.assert_allclose(schedule.sigma(schedule.t(sigma)), sigma, rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_slope_is_the_derivative(name):
    schedule = ALL[name]
    t = np.linspace(0.15, 0.93, 7) * schedule.T + 0.013
    h = 1e-5 * schedule.T
    numeric = (schedule.sigma(t + h) - schedule.sigma(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.slope(t), numeric, rtol=1e-5)


def test_labels_count_from_zero_and_stop_at_the_first_level():
    schedule = NoiseSchedule.linear()
    assert schedule.label(schedule.sigma_max) == 999.0
    assert schedule.label(schedule.sigma(1)) == 0.0
    assert schedule.label(0.0) == 0.0
    assert schedule.label(0.5 * schedule.sigma(1)) == 0.0
    assert schedule.label(schedule.sigma(400.25)) == pytest.approx(399.25, abs=1e-9)
    assert NoiseSchedule.edm().label(3.0) == 3.0
    assert NoiseSchedule.continuous().label(0.0) == 1e-3


@pytest.mark.parametrize("name", ALL)
def test_config_makes_it_again(name):
    schedule = ALL[name]
    again = NoiseSchedule.from_config(schedule.config)
    t = np.linspace(0, schedule.T, 50)
    np.testing.assert_array_equal(again.sigma(t), schedule.sigma(t))


def test_tables_may_be_any_tensor():
    table = torch.tensor([0.9, 0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    assert NoiseSchedule.from_alphas_cumprod(table).alphas_cumprod.tolist() == table.tolist()


def test_config_is_plain_data_whatever_came_in():
    schedule = NoiseSchedule.linear(np.int64(1000), np.float32(1e-4))
    assert json.loads(json.dumps(schedule.config)) == schedule.config
    assert NoiseSchedule.linear(1000.0).T == 1000


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([0.9, 0.5, 0.0], "zero terminal SNR.*drop that last step"),
        ([1.0, 0.5, 0.1], "float64"),
        ([0.9, 0.95, 0.1], "entry 1 .* is not below entry 0"),
        ([0.9], "T >= 2"),
        ([0.9, np.nan], "NaN"),
        ([[0.9, 0.5]], "shape"),
    ],
)
def test_bad_tables_are_refused(table, says):
    with pytest.raises(ValueError, match=says):
        NoiseSchedule.from_alphas_cumprod(table)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NoiseSchedule.linear(1000, 0.0, 0.02), "beta"),
        (lambda: NoiseSchedule.continuous(2.0, 1.0), "beta_min < beta_max"),
        (lambda: NoiseSchedule.continuous(t_min=0.0), "t_min"),
        (lambda: NoiseSchedule.continuous(0.1, 1e4), "infinite"),
        (lambda: NoiseSchedule.cosine(max_beta=1.0), "cap it below 1"),
        (lambda: NoiseSchedule.edm(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: NoiseSchedule.flow(0.1, 1.0), "t_max < 1"),
        (lambda: NoiseSchedule.from_config({"kind": "square"}), "square"),
        (lambda: NoiseSchedule.from_config({"kind": "edm", "T": 5}), "does not fit the schedule kind 'edm'"),
        (lambda: NoiseSchedule.linear(2.5), "T must be a whole number"),
        (lambda: NoiseSchedule.cosine(1), "T must be a whole number of at least 2"),
        (lambda: NoiseSchedule.scaled_linear(10, -0.1), "beta"),
        (lambda: NoiseSchedule.linear().sigma(1001), r"\[0, 1000\]"),
        (lambda: NoiseSchedule.linear().t(-1.0), "sigma must lie in"),
        (lambda: NoiseSchedule.linear().label(np.nan), "sigma must lie in"),
    ],
)
def test_bad_arguments_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
