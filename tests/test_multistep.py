"""Correctors, flow and fitted Gaussian parts: coefficients by hand, limits, refusals."""

import math
import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import ddim_ode
from ddim_ode import (
    DATA,
    NOISE,
    EpsilonField,
    Flow,
    Gaussian,
    Grid,
    Multistep,
    NoiseSchedule,
    SingleStep,
    encode,
    fit_gaussian,
    integrate,
    noise,
    sample,
)
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import arctan, clock, flow, get
from tests.test_identities import ADAMS_BASHFORTH, Impulses, Recorder, close, epsilon_model, response

LINEAR = NoiseSchedule.linear()
#: On even steps, newest first; the first is the step's own end.
ADAMS_MOULTON = {
    2: (1 / 2, 1 / 2),
    3: (5 / 12, 8 / 12, -1 / 12),
    4: (9 / 24, 19 / 24, -5 / 24, 1 / 24),
}


@pytest.fixture
def field():
    return EpsilonField(epsilon_model, LINEAR, shape=(2, 3))


# -- correctors ---------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", [1, -1], ids=["encoding", "sampling"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_weights_of_adams_bashforth_moulton(k, direction):
    """The free corrector: the step before by Adams–Moulton once its end is known, then Adams–Bashforth ahead."""
    h, steps = 0.25, 8
    grid = Grid.explicit((1.0 + h * np.arange(steps + 1.0))[::direction], LINEAR)
    states, field = response(get(f"abm{k}"), grid)
    assert field.sigmas == grid.sigmas[:-1].tolist()
    corrected = torch.zeros_like(states[0])
    for n in range(1, steps):
        used = min(k, n + 1)
        weights = torch.zeros_like(corrected)
        for j, w in enumerate(ADAMS_MOULTON[used]):
            weights[n - j] = w
        corrected = corrected + direction * h * weights
        ahead = torch.zeros_like(corrected)
        for j, w in enumerate(ADAMS_BASHFORTH[min(k - 1, n + 1)]):
            ahead[n - j] = w
        assert float((states[n + 1] - corrected - direction * h * ahead).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pece_predicts_evaluates_corrects_and_evaluates_again(k):
    """Evaluations come in pairs: at the node, and at its predicted successor."""
    h, steps = 0.25, 8
    grid = Grid.explicit(1.0 + h * np.arange(steps + 1.0), LINEAR)
    states, field = response(get(f"abm{k}-pece"), grid)
    nodes = grid.sigmas.tolist()
    assert field.sigmas == [s for pair in pairwise(nodes) for s in pair]
    for n in range(steps):
        moved = (states[n + 1] - states[n]) / h
        wanted = torch.zeros_like(moved)
        new, *old = ADAMS_MOULTON[min(k, n + 2)]
        wanted[2 * n + 1] = new
        for j, w in enumerate(old):
            wanted[2 * (n - j)] = w
        assert float((moved - wanted).abs().max()) < 1e-12
        # And what was predicted is what was asked about.
        predicted = (field.states[2 * n + 1][0] - states[n]) / h
        for j, w in enumerate(ADAMS_BASHFORTH[min(k - 1, n + 1)]):
            predicted[2 * (n - j)] -= w
        assert float(predicted.abs().max()) < 1e-12


@pytest.mark.parametrize("linear", [NOISE, DATA, Flow(0.5)], ids=lambda part: part.name)
@pytest.mark.parametrize("clock", ["sigma", "t", "log", "arctan", "flow"])
@pytest.mark.parametrize("start", ["ramp", "rk"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_calls_of_correctors(k, start, clock, linear):
    latent = noise((2, 3), 2, seed=0)
    for corrector in ("free", "pece"):
        member = Multistep(k, clock=clock, linear=linear, corrector=corrector, start=start)
        for steps in (1, 2, 3, 7):
            spy = Recorder(lambda x, s: 0.3 * x / (1.0 + s))
            grid = Grid.make("quadratic", LINEAR, steps)
            run = sample(EpsilonField.from_sigma(spy, LINEAR), latent, grid=grid, solver=member)
            assert run.nfe == member.nfe(steps) == len(spy.sigmas)
            assert spy.sigmas == member.stages(grid).tolist()
            back = encode(EpsilonField.from_sigma(spy, LINEAR), latent, grid=grid, solver=member, data_range=None)
            assert back.success
            assert back.nfe == member.calls(grid.reversed())
            for nodes in ([9.0, 3.0, 1.0, 0.2], [0.2, 1.0, 3.0, 9.0]):
                part = Grid.explicit(nodes, LINEAR)
                run = ddim_ode.integrate(EpsilonField.from_sigma(spy, LINEAR), latent, part, member)
                assert run.nfe == member.calls(part)


@pytest.mark.parametrize("corrector", ["free", "pece"])
def test_a_corrector_of_one_evaluation_is_the_trapezium(field, corrector):
    """On one step: Euler ahead, and under PECE the mean of both slopes."""
    x = noise((2, 3), 4, seed=5)
    member = Multistep(1, corrector=corrector)
    got = integrate(field, x, [2.0, 1.5], member).x_bar
    first = field(x, 2.0)
    ahead = x - 0.5 * first
    wanted = ahead if corrector == "free" else x - 0.25 * (first + field(ahead, 1.5))
    close(got, wanted)


def test_the_free_corrector_does_not_change_what_it_is_given(field):
    x = noise((2, 3), 4, seed=5)
    member, grid = get("abm4"), Grid.make("quadratic", LINEAR, 6)
    state = member.init(field, x, grid)
    for n in range(3):
        before, kept = x.clone(), [z.clone() for z in state.history]
        once, after, _ = member.step(field, x, n, state)
        again, _, _ = member.step(field, x, n, state)
        assert torch.equal(once, again)
        assert torch.equal(x, before)
        assert all(torch.equal(a, b) for a, b in zip(kept, state.history, strict=True))
        x, state = once, after


def test_a_budget_is_kept_in_both_directions_and_on_any_grid():
    field = EpsilonField.from_sigma(lambda x, s: 0.3 * x / (1.0 + s), LINEAR, shape=(2, 3))
    latent = noise((2, 3), 2, seed=0)
    members = [
        Multistep(2, clock="log", linear=DATA, corrector="pece", start="rk"),
        get("dpm2s"),
        get("dpm3s"),
        get("heun-edm"),
    ]
    members += [SingleStep("own", 2, (0.0, 0.5), ((0,), (1,)), DATA, "arctan"), get("pf-euler"), get("abm4-pece-rk")]
    for member in members:
        for nfe in (7, 9, 12):
            assert sample(field, latent, solver=member, nfe=nfe).nfe <= nfe
            assert encode(field, latent / 4, solver=member, nfe=nfe, data_range=None).nfe <= nfe
        nodes = [10.0, 1.0, 0.1]
        needed = member.calls(Grid.explicit(nodes, LINEAR))
        assert sample(field, latent, solver=member, grid=nodes, nfe=needed).nfe == needed
        with pytest.raises(ValueError, match=f"takes {needed}"):
            sample(field, latent, solver=member, grid=nodes, nfe=needed - 1)


# -- flow ---------------------------------------------------------------------------------------
def test_flow_is_rectified_flows_own_equation(field):
    """Adams–Bashforth 2 on d(x̄/(1 + σ))/dt = ε − x̂₀, t = σ/(1 + σ), by hand."""
    x_bar = noise((2, 3), 4, seed=5)
    nodes = [3.0, 2.0, 1.2, 0.5, 0.1, 0.0]
    got = integrate(field, x_bar, nodes, get("flow2")).x_bar
    t = [s / (1.0 + s) for s in nodes]
    x, before = x_bar / (1.0 + nodes[0]), None
    for n, sigma in enumerate(nodes[:-1]):
        eps = field(x * (1.0 + sigma), sigma)
        v = eps - (x * (1.0 + sigma) - sigma * eps)
        h = t[n + 1] - t[n]
        if before is None:
            x = x + h * v
        else:
            r = h / (t[n] - t[n - 1])
            x = x + h * ((1.0 + r / 2.0) * v - r / 2.0 * before)
        before = v
    close(got, x * (1.0 + nodes[-1]))


@pytest.mark.parametrize("corrector", [None, "free"])
@pytest.mark.parametrize("clock", ["sigma", "arctan"])
def test_flow_lies_between_noise_and_data(field, clock, corrector):
    x_bar, nodes = noise((2, 3), 4, seed=5), np.geomspace(5.0, 0.2, 9)
    run = lambda linear: (
        integrate(field, x_bar, nodes, Multistep(3, clock=clock, linear=linear, corrector=corrector)).x_bar
    )
    close(run(Flow(1e8)), run(NOISE), 1e-6)
    close(run(Flow(1e-8)), run(DATA), 1e-6)
    assert float((run(Flow(1.0)) - run(NOISE)).abs().max()) > 1e-6


def test_the_flow_clock_and_its_slope():
    u, s = flow(0.7), np.geomspace(1e-4, 100.0, 50)
    np.testing.assert_allclose(u.sigma(u.u(s)), s, rtol=1e-12)
    step = 1e-6 * s
    np.testing.assert_allclose((u.u(s + step) - u.u(s - step)) / (2 * step), 1.0 / u.slope(s), rtol=1e-7)


def test_the_flow_grid_is_even_in_its_clock():
    grid = Grid.make("flow", LINEAR, 10, c=2.0, rho=1.5)
    assert grid.sigmas[0] == LINEAR.sigma_max
    assert grid.sigmas[-1] == 0.0
    ticks = (grid.sigmas / (2.0 + grid.sigmas)) ** (1 / 1.5)
    np.testing.assert_allclose(np.diff(ticks), ticks[0] / -10, rtol=1e-9)
    for steps in (5, 50):
        named = Grid.make("flow", LINEAR, steps, c=3.0 + 20.0 / steps, rho=1.9 + 3.0 / steps)
        assert Grid.make("flow", LINEAR, steps) == named
    time = Grid.make("flow", LINEAR, 4, c=1.0, rho=1.0).sigmas
    np.testing.assert_allclose(
        time / (1 + time), np.linspace(LINEAR.sigma_max / (1 + LINEAR.sigma_max), 0, 5), rtol=1e-12
    )


def test_the_paced_clock_goes_by_the_steps_of_the_grid():
    for steps, c in ((2, 4.0), (10, 4.0), (20, 1.0), (400, 0.5)):
        grid = Grid.make("flow", LINEAR, steps)
        wanted = Multistep(3, clock=arctan(c), linear=Flow(0.2)).plan(grid)
        assert Multistep(3, clock="paced", linear=Flow(0.2)).plan(grid) == wanted
    with pytest.raises(ValueError, match='"paced" goes by the number of steps'):
        clock("paced", LINEAR)


# -- Gaussian parts -----------------------------------------------------------------------------
def _gaussian_data(n=4000, size=6, seed=0):
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.standard_normal((size, size)))[0]
    spread = np.array([4.0, 2.0, 1.0, 0.3, 0.3, 0.3][:size])
    images = 0.5 + (draw.standard_normal((n, size)) * np.sqrt(spread)) @ basis.T
    return torch.from_numpy(images).reshape(n, 2, size // 2), spread


def test_fitted_gaussians_have_the_moments_of_the_data():
    images, spread = _gaussian_data()
    flat = images.flatten(1)
    covariance = (flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat)
    one, each, low = (fit_gaussian(images, kind, rank=3) for kind in ("isotropic", "diagonal", "low-rank"))
    for part in (one, each, low):
        torch.testing.assert_close(part.mean, images.mean(0))
    torch.testing.assert_close(one.variance, covariance.diagonal().mean())
    torch.testing.assert_close(each.variance, covariance.diagonal().reshape(2, 3))
    values = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(low.variance, values[:3])
    assert low.rest == pytest.approx(float(values[3:].mean()))
    torch.testing.assert_close(low.basis @ torch.diag(low.variance) @ low.basis.T @ low.basis, covariance @ low.basis)
    np.testing.assert_allclose(low.variance.numpy(), spread[:3], rtol=0.1)
    whole = fit_gaussian(images, rank=6)
    assert whole.rest is None
    torch.testing.assert_close(whole.basis @ torch.diag(whole.variance) @ whole.basis.T, covariance)


def test_fewer_images_than_dimensions_give_the_same_directions():
    images = torch.randn(12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = fit_gaussian(images, rank=5)
    centred = images - images.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / 12)
    torch.testing.assert_close(low.variance, values[-5:].flip(0))
    overlap = (low.basis.T @ vectors[:, -5:].flip(1)).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("quantity", ["noise", "own"])
@pytest.mark.parametrize("corrector", [None, "free", "pece"])
def test_one_step_is_exact_on_the_fitted_gaussian(corrector, quantity):
    """Low rank and a rest: exact for N(μ, U(λ − r)Uᵀ + r), on a step of any length, both ways."""
    images, _ = _gaussian_data()
    low = fit_gaussian(images, rank=2)
    inside = low.basis @ torch.diag(low.variance - low.rest) @ low.basis.T
    exact = GaussianEpsilon(low.mean, inside + low.rest * torch.eye(6, dtype=torch.float64))
    field = EpsilonField.from_sigma(exact, LINEAR)
    start = noise((2, 3), 3, seed=1)
    member = Multistep(3, linear=low, corrector=corrector, quantity=quantity)
    for nodes in ([LINEAR.sigma_max, 0.0], [0.0, LINEAR.sigma_max], [5.0, 1.0, 0.3, 0.0]):
        got = integrate(field, start * max(nodes[0], 1.0), nodes, member).x_bar
        close(got, exact.solution(start * max(nodes[0], 1.0), nodes[0], nodes[-1]), 1e-10)


def test_low_rank_is_the_full_basis_with_equal_variances(field):
    draw = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.linalg.qr(draw).Q
    few = Gaussian(torch.zeros(2, 3), torch.tensor([2.0, 0.5]), full[:, :2], 0.1)
    all_six = Gaussian(torch.zeros(2, 3), torch.tensor([2.0, 0.5, *[0.1] * 4], dtype=torch.float64), full)
    x_bar, nodes = noise((2, 3), 4, seed=5), np.geomspace(5.0, 0.2, 9)
    for quantity in ("noise", "own"):
        runs = [
            integrate(field, x_bar, nodes, Multistep(3, linear=part, quantity=quantity)).x_bar
            for part in (few, all_six)
        ]
        close(runs[0], runs[1])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: arctan(-1.0), ValueError, "c of the clock arctan must be a positive noise level"),
        (lambda: flow(0.0), ValueError, "c of the clock flow must be"),
        (lambda: clock("paced", LINEAR, 0), ValueError, "steps must be a whole number"),
        (lambda: Flow("a"), ValueError, "c of a Flow must be a positive number"),
        (lambda: Gaussian(torch.zeros(2), torch.tensor([1.0, torch.inf])), ValueError, "1 of 2 are not"),
        (lambda: Gaussian(torch.tensor([0.0, torch.nan]), torch.ones(2)), ValueError, "mean must be finite"),
        (lambda: Gaussian(torch.zeros(4), torch.ones(0), torch.zeros(4, 0), 1.0), ValueError, "variance must be"),
        (
            lambda: Gaussian(torch.zeros(4), torch.ones(2), torch.eye(4)[:, :2], "1"),
            ValueError,
            "rest must be the positive",
        ),
        (lambda: Multistep(2, corrector="moulton"), ValueError, 'corrector must be None, "free" or "pece"'),
        (lambda: Multistep(2, quantity="velocity"), ValueError, "unknown quantity 'velocity'"),
        (lambda: Multistep(2, linear="flow"), TypeError, "linear must be NOISE"),
        (lambda: Flow(0.0), ValueError, "c of a Flow must be a positive number"),
        (lambda: Flow(math.inf), ValueError, "c of a Flow must be a positive number"),
        (lambda: Gaussian(torch.zeros(4), torch.ones(2), torch.eye(4)[:, :2]), ValueError, "rest must be the positive"),
        (lambda: Gaussian(torch.zeros(4), torch.ones(4), torch.eye(4), 1.0), ValueError, "rest must be"),
        (lambda: Gaussian(torch.zeros(4), torch.ones(4), None, 1.0), ValueError, "no basis is given"),
        (lambda: fit_gaussian(torch.zeros(4, 3, dtype=torch.uint8)), TypeError, "tensor of floats"),
        (lambda: fit_gaussian(np.zeros((4, 3))), TypeError, "tensor of floats"),
        (lambda: fit_gaussian(torch.zeros(1, 3)), ValueError, "N >= 2"),
        (lambda: fit_gaussian(torch.zeros(4, 3)), ValueError, "must differ"),
        (lambda: fit_gaussian(torch.full((4, 3), torch.nan)), ValueError, "must be finite"),
        (lambda: fit_gaussian(torch.randn(4, 3), "full"), ValueError, "kind must be"),
        (lambda: fit_gaussian(torch.randn(4, 9), rank=4), ValueError, "rank must be less than the 4 images"),
        (lambda: fit_gaussian(torch.randn(9, 4), rank=5), ValueError, "at most 4"),
    ],
)
def test_bad_arguments_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_gaussian_part_is_a_copy():
    """Plans are kept by the part: it must not change under them."""
    variance = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    part = Gaussian(torch.zeros(2), variance)
    with torch.no_grad():
        variance.fill_(5.0)
    assert part.variance.tolist() == [1.0, 2.0]
    assert not part.variance.requires_grad


def test_what_members_say_they_are_exact_for():
    assert get("ab3").exact == "constant ε"
    assert get("dpmpp2m").exact == "constant x̂₀"
    assert get("flow2").exact == "constant cε − x̂₀"
    assert Multistep(1, linear=Flow(1.0), quantity="noise").exact == "a constant rest"
    assert get("pf-euler").exact == "constant score"
    # And they are, on one step; ε = 1, ε of a fixed x̂₀, and a constant velocity.
    x = noise((2, 3), 2, seed=3)
    for eps, name in (
        (lambda x_bar, s: torch.ones_like(x_bar), "ab3"),
        (lambda x_bar, s: (x_bar - 0.3) / s, "dpmpp2m"),
        (lambda x_bar, s: (x_bar + 0.7) / (1.0 + s), "flow2"),
    ):
        field = EpsilonField.from_sigma(eps, LINEAR)
        fine = ddim_ode.integrate(field, x, np.linspace(4.0, 1.0, 400), "rk4").x_bar
        close(ddim_ode.integrate(field, x, [4.0, 1.0], name).x_bar, fine, 1e-8)


def test_orders_are_told_of_the_named_member_alone():
    assert get("ddim").measured is not None
    assert Multistep(4, clock="log", linear=DATA, label="ddim").measured is None
    assert Multistep(2, clock=arctan(0.3), linear=Flow(0.2)).measured is None
    assert replace(get("dopri5"), rtol=1e-3).measured == get("dopri5").measured


def test_clocks_of_one_number_are_one_clock_and_travel():
    assert arctan(0.1) == arctan(0.1) != arctan(0.2)
    assert hash(arctan(0.1)) == hash(arctan(0.1))
    assert arctan(0.1) != flow(0.1)
    for name in ("flowup4", "flowdown5", "dopri5", "rk4", "unipc3"):
        assert pickle.loads(pickle.dumps(get(name))) == get(name)


def test_impulses_are_independent():
    """The tool the coefficient tests rest on."""
    field = Impulses(5)
    first, second = field(torch.zeros(1, 5), 1.0), field(torch.zeros(1, 5), 0.5)
    assert first[0].tolist() == [1, 0, 0, 0, 0]
    assert second[0].tolist() == [0, 1, 0, 0, 0]
