"""Calibrated solvers: the tables they are, what is fitted and how well, their files, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import null_space
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_ode
from benchmarks.problems import digits_mixture
from ddim_ode import Calibrated, EpsilonField, Grid, NoiseSchedule, calibrate, load_solver
from ddim_ode import calibration as study
from ddim_ode.dense import Dense
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import get
from ddim_ode.solvers.calibrated import PART, Table, table
from ddim_ode.solvers.configs import from_config, to_config

LINEAR = NoiseSchedule.linear()


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.fixture(scope="module")
def digits():
    return EpsilonField.from_sigma(digits_mixture(), LINEAR, shape=(1, 8, 8))


@pytest.fixture(scope="module")
def five(digits):
    """A solver of five calls for the digits."""
    return calibrate(digits, 5, n=24, refine=4)


def gaussian(size=6):
    variance = torch.logspace(-3, 0, size, dtype=torch.float64)
    model = GaussianEpsilon(torch.zeros(size), torch.diag(variance))
    return EpsilonField.from_sigma(model, LINEAR, shape=(size,)), model


# -- tables -------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", [False, True], ids=["down", "up"])
@pytest.mark.parametrize(
    "name", ["ddim", "ab4", "deis3", "abm3", "flowdown5", "flowup4", "unipc2", "ipndm", "alf-flow", "dpmpp2m"]
)
def test_a_table_does_what_its_method_does(name, encoding):
    method = get(name)
    rule = "asinh" if name in ("dpmpp2m", "unipc2") else "flow"
    grid = Grid.make(rule, LINEAR, 7)
    if name in ("dpmpp2m", "unipc2") and encoding:
        grid = Grid.explicit(grid.sigmas[:-1], LINEAR)  # their first step from 0 is eq. 13's, another part's
    grid = grid.reversed() if encoding else grid
    found = table(method, grid)
    field = EpsilonField.from_sigma(lambda x, sigma: torch.sin(x) * (1.0 + sigma) / (2.0 + sigma), LINEAR)
    x_bar = torch.randn((3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_bar = 1.0 + grid.sigmas[0] * x_bar
    plain = ddim_ode.integrate(field, x_bar, grid, method)
    own = Calibrated(found, "{}", force=True)
    again = ddim_ode.integrate(field, x_bar, own.own_grid(LINEAR), own)
    assert again.nfe == plain.nfe == found.steps == method.calls(grid)
    assert rms(again.x_bar - plain.x_bar) < 1e-11 * rms(plain.x_bar)
    # Of constant ε and constant data all of these are exact, and so are their tables.
    for n, (propagator, weights) in enumerate(zip(found.propagators, found.weights, strict=True)):
        sigma, to = found.sigmas[n : n + 2]
        if name not in ("dpmpp2m", "unipc2", "alf-flow"):
            assert propagator == pytest.approx((PART.c + to) / (PART.c + sigma), rel=1e-6)
            assert sum(weights) == pytest.approx((to - sigma) / (PART.c + sigma), rel=1e-6)


@pytest.mark.parametrize("name", ["rk4", "heun", "midpoint"])
def test_methods_that_ask_twice_have_no_table(name):
    # The midpoint rule asks in order, once at each level: it has one.
    grid = Grid.make("flow", LINEAR, 3)
    if name == "midpoint":
        assert table(get(name), grid).steps == 6
        return
    with pytest.raises(ValueError, match="does not ask for ε once at each level"):
        table(get(name), grid)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (((2.0, 1.0, 0.0), (1.0,), ((1.0,), (1.0, 2.0))), "needs 2 propagators and rows of weights, but has 1 and 2"),
        (
            ((2.0, 1.0, 0.0), (1.0, 1.0), ((1.0, 2.0), (1.0,))),
            "row 0 of the weights must have 1 to 1 numbers, but has 2",
        ),
        (((2.0, 1.0, 0.0), (1.0, math.nan), ((1.0,), (1.0,))), "must be finite"),
    ],
)
def test_tables_that_are_none(numbers, message):
    with pytest.raises(ValueError, match=message):
        Table(*numbers)


# -- what is fitted -----------------------------------------------------------------------------
def last_columns(eps, made):
    """What the last step of a table multiplies: its state, and the evaluations before it, the last one first."""
    x, z = 1.0, []
    for n, sigma in enumerate(made.sigmas[:-1]):
        z.insert(0, (PART.c + sigma) * eps(x, sigma) - x)
        last, x = x, made.propagators[n] * x + sum(w * own for w, own in zip(made.weights[n], z, strict=False))
    return [last, *z]


@pytest.mark.parametrize("encoding", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_least_squares_finds_the_optimum_of_a_gaussian(encoding, consistent, shrinkage):
    """With a row of latents for each direction, the sum over samples is the expectation over all, and the optimum a formula."""
    field, model = gaussian()
    variance = model.variance.numpy()
    grid = Grid.make("flow", LINEAR, 6)
    grid = grid.reversed() if encoding else grid
    base = get("flowdown5")
    plain = table(base, grid)
    sigmas = np.array(plain.sigmas)
    flow = np.sqrt(
        (variance + sigmas[:, None] ** 2) / (variance + sigmas[0] ** 2)
    )  # x̄ over the first one, by direction
    turn = torch.diag(torch.from_numpy(np.sqrt(variance + sigmas[0] ** 2))) @ model.basis.T
    path = Dense(sigmas, torch.stack([torch.diag(torch.from_numpy(f)) @ turn for f in flow]), (None,) * len(sigmas), 1)
    half = study._Half(path.x_bar[0], path.x_bar[-1], path, torch.arange(6))
    task = study._Task(field, "encode" if encoding else "sample", 4)
    found = study._Study(task, half, half, consistent, lambda what: None).least_squares(
        study._Member.of(base, grid, consistent), shrinkage
    )
    # The same by directions: a state is a number for each, and weighs as much as the direction's own spread.
    weight = np.sqrt(variance + sigmas[0] ** 2)
    x, z, made = np.ones(6), [], found.table()
    for n in range(plain.steps):
        ratio = sigmas[n] / (variance + sigmas[n] ** 2)
        z.insert(0, (PART.c + sigmas[n]) * ratio * x - x)
        step = abs(sigmas[n + 1] - sigmas[n]) / (PART.c + sigmas[n])
        ahead = plain.propagators[n] * x + sum(w * own for w, own in zip(plain.weights[n], z, strict=False))
        if consistent:
            columns, at = [own - z[0] for own in z[1 : study.HISTORY]], range(2, 1 + min(n + 1, study.HISTORY))
        else:
            columns, at = [x, *z[: study.HISTORY]], range(1 + min(n + 1, study.HISTORY))
        if columns:
            matrix = step * weight[:, None] * np.stack(columns, axis=1)
            gram = matrix.T @ matrix
            left = weight * (flow[n + 1] - ahead)
            # By the pseudo-inverse on the same cut, for more numbers than directions have no one optimum.
            damped = gram + shrinkage * np.diag(np.diag(gram))
            allowed = np.eye(len(columns))
            if n + 1 == plain.steps and not encoding and not consistent:
                # Of noise over data that are 0 nothing must be left: by the least change that does it.
                lone = np.array([last_columns(lambda x, s: x / s, made)])
                row = np.array([plain.propagators[n], *plain.weights[n]])
                ahead = ahead - np.stack(columns, axis=1) @ np.linalg.pinv(lone[:, : len(columns)]) @ (
                    lone[:, : len(row)] @ row
                )
                left, allowed = weight * (flow[n + 1] - ahead), null_space(lone[:, : len(columns)])
            theta = allowed @ np.linalg.lstsq(allowed.T @ damped @ allowed, allowed.T @ matrix.T @ left, rcond=1e-14)[0]
            x = ahead + step * np.stack(columns, axis=1) @ theta
            if shrinkage:
                np.testing.assert_allclose(found.added[n, list(at)], theta, rtol=1e-6, atol=1e-9)
        else:
            x = ahead
        # And so is where it leads, which is all that the numbers are for.
    ends = study._Study(task, half, half, consistent, lambda what: None).judge("", found)
    wanted = torch.diag(torch.from_numpy(x)) @ turn
    assert rms(ends.ends - wanted) < (1e-7 if shrinkage else 1e-5) * rms(wanted)
    if not shrinkage and not consistent:
        plain_error = study._Study(task, half, half, consistent, lambda what: None).judge("", (base, grid)).held
        assert ends.held < (0.01 if encoding else 0.3) * plain_error  # it costs to leave no noise


@pytest.mark.parametrize("consistent", [False, True])
def test_no_noise_is_left(digits, consistent):
    """Data that are one value end all alike, if not always at it: least squares would leave some noise in everything."""
    solver = calibrate(digits, 5, n=24, refine=1, consistent=consistent)
    assert solver.record["kept"] != "default"
    alone = EpsilonField.from_sigma(lambda x, sigma: (x - 0.5) / sigma, LINEAR, shape=(1, 8, 8))
    x_bar = 0.5 + solver.numbers.sigmas[0] * torch.randn((4, 1, 8, 8), dtype=torch.float64)
    below = Calibrated(solver.numbers, solver.model, force=True)
    end = ddim_ode.integrate(alone, x_bar, Grid.explicit(solver.numbers.sigmas, LINEAR), below).x_bar
    torch.testing.assert_close(end, end.mean().expand_as(end), rtol=0, atol=1e-9)
    assert abs(float(end.mean()) - 0.5) < (1e-9 if consistent else 0.005)


@pytest.mark.parametrize("nfe", [2, 3, 10])
@pytest.mark.parametrize("base", ["flowdown5", "flow3", "ab4"])
def test_numbers_are_held_to_leave_no_noise(base, nfe):
    """Whatever the numbers, of rows shorter and longer than what can be fitted; encoding there is nothing to leave."""
    grid = Grid.make("flow", LINEAR, nfe)
    for nodes in (grid, grid.reversed()):
        member = study._Member.of(get(base), nodes, False)
        rng = np.random.default_rng(0)
        member = replace(member, added=0.02 * rng.standard_normal(member.added.shape))
        made = member.table()
        assert member.bound == (nodes is grid)
        if member.bound:
            x_bar, *z = last_columns(lambda x, s: x / s, made)
            end = made.propagators[-1] * x_bar + sum(w * own for w, own in zip(made.weights[-1], z, strict=False))
            assert abs(end) < 1e-12 * grid.sigmas[0]


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_it_is_better_than_the_default_on_unseen_trajectories(direction, digits, five):
    """Errors of digits never fitted to, by the geometric mean: one digit of 64 that turns into another is no news."""
    latent = ddim_ode.noise((1, 8, 8), 64, 99)
    exact = ddim_ode.sample(digits, latent, nfe=400, solver="ab4-rk", grid="asinh").x
    if direction == "sample":
        solver = five
        found, plain = ddim_ode.sample(digits, latent, solver=solver), ddim_ode.sample(digits, latent, nfe=5)
        wanted = exact
    else:
        solver = calibrate(digits, 10, n=24, refine=2, direction="encode")
        found = ddim_ode.encode(digits, exact, solver=solver, data_range=None)
        plain, wanted = ddim_ode.encode(digits, exact, nfe=10, data_range=None), latent
    assert found.nfe == plain.nfe == solver.numbers.steps
    each = lambda x: (x - wanted).flatten(1).square().mean(1).sqrt().log().mean().exp()
    assert each(found.x) < 0.5 * each(plain.x)
    record = solver.record
    assert record["kept"] != "default"
    assert record["direction"] == direction
    assert [stage["stage"] for stage in record["stages"]] == [
        "default", "coefficients", "coefficients and grid", "refined"
    ]  # fmt: skip
    assert record["trajectories"] == {"fitted": 16, "held_back": 8, "dropped": []}
    assert record["reference"]["rms_difference"] < 1e-4
    assert record["reference"]["calls"] == 24 * (400 + 200)
    assert 0.8 < record["high_frequencies"]["kept"] < 1.25


def test_calls_are_counted(digits):
    before = digits.nfe
    solver = calibrate(digits, 4, n=6, refine=1, reference_nfe=100)
    # All of a half in one batch: calls on batches are fewer than evaluations of single samples.
    assert digits.nfe - before < solver.record["calls"]
    before = digits.nfe
    one = calibrate(digits, 4, n=6, refine=1, reference_nfe=100, batch_size=1)
    assert one.record["calls"] == pytest.approx(solver.record["calls"], rel=0.02)  # a step that rounding decides
    assert digits.nfe - before == one.record["calls"]
    np.testing.assert_allclose(one.numbers.propagators, solver.numbers.propagators, rtol=1e-6)


def test_what_is_fitted_depends_on_nothing_held_back(digits):
    """Least squares see the first two thirds alone."""
    latents = ddim_ode.noise((1, 8, 8), 9, 3)
    other = torch.cat((latents[:6], ddim_ode.noise((1, 8, 8), 3, 4)))
    found = []
    for given in (latents, other):
        task = study._Task(digits, "sample", 64)
        known = study._reference(task, given.double(), False, 80)
        halves = known.split()
        assert [len(half.rows) for half in halves] == [6, 3]
        made = study._Study(task, *halves, False, lambda what: None)
        found.append(made.least_squares(study._Member.of(get("flow3"), Grid.make("flow", LINEAR, 4), False), 1e-2))
    np.testing.assert_array_equal(found[0].added, found[1].added)


@pytest.mark.parametrize(
    ("errors", "better"),
    [
        ([0.5, 0.6, 0.4, 0.5], True),
        ([1.0, 1.0, 1.0, 0.9], False),  # by chance, as far as anyone knows
        ([0.1, 0.1, 0.1, 4.0], False),  # most are better, and one is lost
        ([1.1, 1.1, 1.1, 0.1], False),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([0.0, 0.5, 0.5, 0.5], True),
        ([0.5, 0.5, 0.5, math.inf], False),
    ],
)
def test_a_stage_is_kept_only_if_it_is_better_by_more_than_chance(errors, better, digits):
    task = study._Task(digits, "sample", 8)
    known = study._reference(task, ddim_ode.noise((1, 8, 8), 6, 3).double(), False, 40)
    made = study._Study(task, *known.split(), False, lambda what: None)
    default = made.judge("default", (get("flow3"), Grid.make("flow", LINEAR, 4)))
    each = torch.tensor(errors, dtype=torch.float64)
    first = replace(default, each=torch.ones(4, dtype=torch.float64), held=1.0)
    program = study._Program(table(get("ddim"), Grid.make("flow", LINEAR, 4)), None, False)
    other = replace(default, stage="refined", each=each, held=rms(each), program=program)
    made.stages = [first, other]
    solver = made.result(known, 0.0, None, None)
    assert solver.record["kept"] == ("refined" if better else "default")
    assert solver.numbers == (other if better else default).program.numbers


@pytest.mark.parametrize("seed", range(4))
def test_four_trajectories_never_make_it_worse_on_what_was_held_back(seed, digits):
    solver = calibrate(digits, 5, n=4, seed=seed, refine=2)
    stages = {stage["stage"]: stage["held_back"] for stage in solver.record["stages"]}
    assert stages[solver.record["kept"]] <= stages["default"]


def test_consistent_solvers_are_exact_for_constant_noise_and_data(digits):
    solver = calibrate(digits, 5, n=16, refine=2, consistent=True)
    assert solver.record["consistent"]
    assert solver.record["kept"] != "default"
    generator = torch.Generator().manual_seed(1)
    data, eps = torch.randn((2, 3, 1, 8, 8), generator=generator, dtype=torch.float64)
    field = EpsilonField.from_sigma(lambda x, sigma: eps, LINEAR)
    run = ddim_ode.integrate(field, data + LINEAR.sigma_max * eps, solver.own_grid(LINEAR), replace(solver, force=True))
    assert rms(run.x_bar - data) < 1e-11 * LINEAR.sigma_max


def test_images_are_encoded_as_what_latents_lead_to(digits):
    """The two ways to say where encodings start: the images that latents lead to, or the latents."""
    latents = ddim_ode.noise((1, 8, 8), 12, 8)
    images = ddim_ode.sample(digits, latents, solver="ab4-rk", grid="asinh", nfe=400).x
    by_latents = calibrate(digits, 6, latents=latents, direction="encode", refine=0)
    by_images = calibrate(digits, 6, images=images, direction="encode", refine=0)
    for a, b in zip(by_latents.record["stages"], by_images.record["stages"], strict=True):
        assert a["held_back"] == pytest.approx(b["held_back"], rel=0.05)


def test_conditions_go_with_their_samples():
    """Half of the samples have one condition, half another: each trajectory must be run with its own."""

    class Shifted(nn.Module):
        def forward(self, x, t, condition):
            return 0.5 * (x - condition)

    rows = torch.tensor([[-1.0], [3.0], [0.5], [2.0], [-4.0], [1.0], [0.0], [5.0]]).expand(8, 4)
    field = EpsilonField(Shifted(), LINEAR, condition=rows, shape=(4,))
    solver = calibrate(field, 4, n=8, refine=1, reference_nfe=200, batch_size=3)
    assert solver.record["trajectories"]["dropped"] == []
    # What each half is said to be off by, from runs of each sample alone with its own condition.
    latents = ddim_ode.noise((4,), 8, 0)
    off = []
    for i in range(8):
        alone = EpsilonField(Shifted(), LINEAR, condition=rows[i : i + 1], shape=(4,))
        exact = ddim_ode.sample(alone, latents[i : i + 1], solver="ab4-rk", grid="asinh", nfe=800).x
        off.append(ddim_ode.sample(alone, latents[i : i + 1], nfe=4).x - exact)
    default = solver.record["stages"][0]
    assert default["fitted"] == pytest.approx(rms(torch.cat(off[:5])), rel=0.01)
    assert default["held_back"] == pytest.approx(rms(torch.cat(off[5:])), rel=0.01)
    assert solver.record["kept"] != "default"


@pytest.mark.parametrize("leaping", [False, True])
@pytest.mark.parametrize("encoding", [False, True], ids=["down", "up"])
def test_derivatives_are_those_of_the_ends(encoding, leaping, digits):
    """By each number and each level, beside the difference of whole runs; and the step's gradient is that of the summed errors."""
    task = study._Task(digits, "encode" if encoding else "sample", 3)
    known = study._reference(task, ddim_ode.noise((1, 8, 8), 8, 3).double(), False, 80)
    made = study._Study(task, *known.split(), False, lambda what: None)
    grid = Grid.make("flow", LINEAR, 4)
    member = study._Member.of(get("flowdown5"), grid.reversed() if encoding else grid, False)
    if leaping:
        far = study._Far(ddim_ode.noise((1, 8, 8), 100, 5), made.fitted, encoding, LINEAR.sigma_max)
        member = member.over(far, 20.0)
    at = member.free()
    slopes = torch.cat(made._slopes(member, at), dim=1)
    now = made.judge("", member)
    levels = member.moving.stop - member.moving.start
    assert levels == (4 if leaping else 3)
    assert slopes.shape == (len(at) + levels, 5, 64)
    units = member.units(at)
    assert units.shape == (len(at) + levels,)
    gradient = []
    for k in range(len(slopes)):
        amounts = 1e-4 * np.eye(len(slopes))[k]
        there = [made.judge("", member.plus(at, s * amounts[: len(at)]).moved(s * amounts[len(at) :])) for s in (1, -1)]
        found = (there[0].own_ends - there[1].own_ends).flatten(1) / (2e-4 * task.unit)
        assert rms(found - slopes[k]) < 0.05 * rms(found)
        gradient.append(float((there[0].own - there[1].own).sum()) / 2e-4)
    left = ((now.own_ends - made.fitted.exact) / task.unit).flatten(1)
    expected = torch.einsum("kbd,bd->k", slopes, left / left.norm(dim=1, keepdim=True)) / math.sqrt(64)
    assert rms(torch.tensor(gradient) - expected) < 0.03 * rms(expected)
    # A step is against that gradient, each sample weighing as in it.
    steps = []
    solve = np.linalg.lstsq

    def seen(matrix, right, rcond):
        steps.append(right)
        return solve(matrix, right, rcond=rcond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "lstsq", seen)
        made._step(now, at, list(slopes.split(3, dim=1)))
    torch.testing.assert_close(torch.from_numpy(steps[0]) / 64.0, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("leaping", [False, True])
def test_what_comes_before_a_change_is_not_run_again(leaping, digits):
    grid = Grid.make("flow", LINEAR, 10)
    member = study._Member.of(get("flowdown5"), grid, False)
    if leaping:
        half = study._reference(
            study._Task(digits, "sample", 8), ddim_ode.noise((1, 8, 8), 4, 3).double(), False, 40
        ).whole
        member = member.over(study._Far(ddim_ode.noise((1, 8, 8), 100, 5), half, False, LINEAR.sigma_max), 20.0)
    count = member.moving.stop - member.moving.start
    first = [study._first_change(member.table(), member.moved(0.01 * level).table()) for level in np.eye(count)]
    assert first == ([None, *range(9)] if leaping else list(range(9)))


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_candidates_that_leave_where_the_network_is_finite_are_passed_over(direction):
    """The reference stays inside, a step that is too bold does not: nothing of it is lost but that step."""
    field, _ = gaussian(8)

    def inside(limit):
        def eps(x, sigma):
            far = (x.abs() > limit * torch.sqrt(torch.as_tensor(1.0 + float(sigma) ** 2))).any(dim=1, keepdim=True)
            return torch.where(far, torch.nan, field(x, sigma))

        return EpsilonField.from_sigma(eps, LINEAR, shape=(8,))

    for limit in (3.6, 3.8, 4.0):
        for nfe in (3, 5):
            solver = calibrate(inside(limit), nfe, n=12, refine=2, direction=direction, reference_nfe=100)
            assert all(map(math.isfinite, solver.numbers.propagators))


def test_a_default_that_is_exact_is_kept():
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn((1, 4), generator=generator, dtype=torch.float64)
    field = EpsilonField.from_sigma(lambda x, sigma: eps.expand(len(x), 4), LINEAR, shape=(4,))
    record = calibrate(field, 5, n=6, reference_nfe=100).record
    assert [stage["stage"] for stage in record["stages"]] == [record["kept"]] == ["default"]
    assert record["calls"] == 6 * (100 + 50 + 5)  # nothing more is tried


def test_the_reference_of_encodings_is_judged_by_latents():
    """Along narrow directions a small error of an image is a large one of its latent, and that is what is encoded."""
    variance = torch.logspace(-8, 0, 6, dtype=torch.float64)
    field = EpsilonField.from_sigma(GaussianEpsilon(torch.zeros(6), torch.diag(variance)), LINEAR, shape=(6,))
    with pytest.raises(ValueError, match="does not converge"):
        calibrate(field, 5, n=6, direction="encode", reference_nfe=100)
    assert calibrate(field, 5, n=6, reference_nfe=100, refine=0).record["reference"]["rms_difference"] < 1e-3


# -- the noisy end ------------------------------------------------------------------------------
def far_of(variance, encodes, top):
    """What leaps are made from, of samples whose covariance is exactly this diagonal; and some exact trajectories."""
    size = len(variance)
    corners = torch.diag(torch.sqrt(variance * size))
    sigmas = np.append(np.geomspace(top, 0.01, 300), 0.0)
    start = top * torch.randn((5, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = [torch.sqrt((variance + s * s) / (variance + top * top)) * start for s in sigmas]
    path = Dense(sigmas, torch.stack(flow), (None,) * len(sigmas), 4)
    ends = (flow[-1], flow[0]) if encodes else (flow[0], flow[-1])
    half = study._Half(*ends, path, torch.arange(5))
    return study._Far(torch.cat((corners, -corners)), half, encodes, top)


@pytest.mark.parametrize("encodes", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("level", [30.0, 5.0])
def test_a_leap_is_exact_for_gaussian_data(encodes, level):
    """Along the directions it has, and along all others where those have one variance."""
    top = LINEAR.sigma_max
    variance = torch.cat((torch.logspace(0, 2, 8, dtype=torch.float64), torch.full((12,), 0.01, dtype=torch.float64)))
    far = far_of(variance, encodes, top)
    assert len(far.directions) == study.DIRECTIONS == 8
    x = torch.randn((4, 20), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    below, above = (torch.sqrt(variance + s * s) * x for s in (level, top))
    begin, wanted = (below, above) if encodes else (above, below)
    found = far.leap(level).on(begin)(begin)
    # The mean is that of the trajectories, which float32 has; directions along axes are whole numbers.
    assert rms(found - wanted) < 1e-6 * rms(wanted)


def test_a_leap_puts_the_mean_where_the_trajectories_have_it():
    """Whatever the network makes of the far end: here its data are elsewhere than the samples' covariance says."""
    top = LINEAR.sigma_max
    far = far_of(torch.ones(4, dtype=torch.float64), False, top)
    far.path = replace(far.path, x_bar=far.path.x_bar + 3.0)
    x = torch.from_numpy(far.end)[None]
    found = far.leap(5.0).on(x)(x)
    assert rms(found - far.path(5.0).reshape(1, -1)) < 1e-6


def by_leap(encoding=False, size=6):
    """A solver of four calls that leaps, and one of its shape that does not."""
    nodes = Grid.explicit([20.0, 5.0, 2.0, 0.5, 0.0], LINEAR)
    nodes = nodes.reversed() if encoding else nodes
    far = far_of(torch.logspace(-3, 0, size, dtype=torch.float64), encoding, LINEAR.sigma_max)
    return Calibrated(table(get("flowdown5"), nodes), "{}", far.leap(20.0), force=True)


@pytest.mark.parametrize("encoding", [False, True], ids=["down", "up"])
def test_a_leap_costs_no_call_and_goes_the_whole_way(encoding):
    field, _ = gaussian()
    solver = by_leap(encoding)
    grid = solver.own_grid(LINEAR)
    assert grid.steps == 5
    assert solver.calls(grid) == 4
    assert solver.steps(4) == 5
    assert solver.name == ("calibrated-encode4" if encoding else "calibrated4")
    assert grid.sigmas[-1 if encoding else 0] == LINEAR.sigma_max
    asked = []

    def watched(x, sigma):
        asked.append(float(sigma))
        return field(x, sigma)

    spy = EpsilonField.from_sigma(watched, LINEAR, shape=(6,))
    latent = ddim_ode.noise((6,), 3, 0)
    if encoding:
        run = ddim_ode.encode(spy, latent, solver=solver, data_range=None, trajectory=True)
    else:
        run = ddim_ode.sample(spy, latent, solver=solver, trajectory=True)
    assert run.nfe == 4
    assert asked == list(solver.numbers.sigmas[:-1])
    # The leap is the first step, or the last; the others are the table's.
    before, after = (run.trajectory[-2], run.trajectory[-1]) if encoding else run.trajectory[:2]
    torch.testing.assert_close(after, solver.leap.on(before)(before), rtol=0.0, atol=0.0)
    plain = replace(solver, leap=None)
    begin = run.trajectory[0] if encoding else run.trajectory[1]
    there = ddim_ode.integrate(field, begin, plain.own_grid(LINEAR), plain).x_bar
    torch.testing.assert_close(there, run.trajectory[-2 if encoding else -1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_leaps_are_found_and_kept_where_they_help(direction):
    """Gaussian data are a Gaussian's at every level, so calls begin low."""
    field, _ = gaussian(16)
    solver = calibrate(field, 3, n=16, refine=2, direction=direction)
    assert solver.leap is not None
    assert solver.record["leap"] == max(solver.numbers.sigmas) < 0.2 * LINEAR.sigma_max
    assert solver.record["kept"] != "default"
    stages = {stage["stage"]: stage for stage in solver.record["stages"]}
    assert stages[solver.record["kept"]]["held_back"] < 0.3 * stages["default"]["held_back"]


class Unit(nn.Module):
    """The noise in data of unit variance, around a condition if there is one."""

    def forward(self, x, t, condition=None):
        alpha = torch.tensor(LINEAR.alphas_cumprod.tolist()).to(x)[t.long(), None]
        mean = 0.0 if condition is None else condition * alpha.sqrt()
        return (1.0 - alpha).sqrt() * (x - mean)


def test_no_leap_where_conditions_or_constants_forbid_it():
    """Another condition has another Gaussian, and a leap keeps no constant."""
    make = lambda **options: EpsilonField(Unit(), LINEAR, shape=(16,), **options)
    options = {"n": 8, "refine": 1, "reference_nfe": 200}
    free = calibrate(make(), 3, **options)
    assert free.leap is not None
    conditioned = make(condition=torch.zeros(1, 16))
    assert calibrate(conditioned, 3, **options).leap is None
    assert calibrate(make(), 3, consistent=True, **options).leap is None
    calls = conditioned.nfe
    with pytest.raises(ValueError, match="there are conditions, and it leaps over the noisy end as if there were none"):
        ddim_ode.sample(conditioned, n=1, solver=free)
    assert conditioned.nfe == calls
    ddim_ode.sample(conditioned, n=1, solver=replace(free, force=True))


def test_a_forced_leap_begins_where_it_was_made_to():
    """On a schedule that reaches further up the run begins at the σ_T of the leap; on one that does not, there is none."""
    solver = by_leap()
    for schedule in (NoiseSchedule.cosine(), NoiseSchedule.flow()):
        assert schedule.sigma_max > LINEAR.sigma_max
        field = EpsilonField.from_sigma(gaussian()[1], schedule, shape=(6,))
        assert solver.own_grid(schedule).sigmas[0] == LINEAR.sigma_max
        run = ddim_ode.sample(field, n=4, seed=3, solver=solver)
        exact = ddim_ode.sample(field, n=4, seed=3, solver="ab4-rk", grid=Grid.make("asinh", LINEAR, 400).sigmas).x
        assert rms(run.x - exact) < 0.2 * rms(exact)
    made = replace(solver, force=False, model=json.dumps({"schedule": "another"}))
    field = EpsilonField.from_sigma(gaussian()[1], NoiseSchedule.edm(), shape=(6,))
    with pytest.raises(ValueError, match="calibrated for another model"):
        ddim_ode.sample(field, n=1, solver=made)
    with pytest.raises(ValueError, match="must not exceed the schedule's sigma_max"):
        ddim_ode.sample(field, n=1, solver=solver)
    assert field.nfe == 0


@pytest.mark.parametrize("encoding", [False, True], ids=["down", "up"])
def test_there_are_no_states_within_a_leap(encoding):
    field, _ = gaussian()
    solver = by_leap(encoding)
    grid = solver.own_grid(LINEAR)
    x_bar = grid.sigmas[0] * ddim_ode.noise((6,), 2, 0)
    run = ddim_ode.integrate(field, x_bar, grid, solver, dense=True, save_at=[20.0, 0.0], trajectory=True)
    torch.testing.assert_close(run.saved[0], run.trajectory[-2 if encoding else 1], rtol=0.0, atol=0.0)
    assert run.out(3.0).isfinite().all()
    with pytest.raises(ValueError, match="sigma must lie in the run, 0 to 20, but got 50"):
        run.out(50.0)
    calls = field.nfe
    with pytest.raises(ValueError, match="save_at must be sigmas in the run, 0 to 20"):
        ddim_ode.integrate(field, x_bar, grid, solver, save_at=[50.0])
    assert field.nfe == calls
    stopped = ddim_ode.integrate(field, x_bar, grid, solver, dense=True, callback=lambda step: step.index == 1)
    assert stopped.out(float(stopped.sigma[0])).isfinite().all()


def test_a_leap_goes_into_files_and_configs(tmp_path):
    solver = by_leap()
    path = tmp_path / "four.json"
    solver.save(path)
    again = load_solver(path, force=True)
    assert again == solver
    assert again != replace(solver, leap=None)
    assert from_config(json.loads(json.dumps(to_config(solver)))) == solver
    text = path.read_text("utf-8")
    path.write_text(text.replace(solver.leap.shift, "A" * len(solver.leap.shift)), "utf-8")
    with pytest.raises(ValueError, match="damaged"):
        load_solver(path)


def test_a_leap_refuses_samples_of_another_size():
    solver = by_leap()
    field, _ = gaussian(5)
    with pytest.raises(ValueError, match=r"samples of 6 numbers, and not of shape \(5,\)"):
        ddim_ode.sample(field, n=1, solver=solver)
    assert field.nfe == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leaps_on_fake_cuda(dtype):
    solver = by_leap()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty((2, 6), dtype=dtype, device="cuda")
        field = EpsilonField.from_sigma(lambda x, sigma: 0.5 * x, LINEAR, shape=(6,))
        run = ddim_ode.integrate(field, x, solver.own_grid(LINEAR), solver)
        assert run.x_bar.device.type == "cuda"
        assert run.x_bar.dtype == dtype


# -- files --------------------------------------------------------------------------------------
def test_a_file_holds_all_of_it(five, digits, tmp_path):
    path = tmp_path / "five.json"
    five.save(path)
    again = load_solver(path)
    assert again == five
    assert again.record == json.loads(json.dumps(five.record))
    latent = ddim_ode.noise((1, 8, 8), 2, 0)
    a, b = (ddim_ode.sample(digits, latent, solver=solver).x for solver in (five, again))
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["five.json"]
    assert from_config(json.loads(json.dumps(to_config(five)))) == five


def test_files_that_are_refused(five, tmp_path):
    with pytest.raises(ValueError, match=r"written as \.json"):
        five.save(tmp_path / "five.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_solver(tmp_path / "none.json")
    path = tmp_path / "five.json"
    five.save(path)
    text = path.read_text("utf-8")
    for damaged, message in (
        (text[: len(text) // 2], "cut short"),
        (text.replace('"c": 0.15', '"c": 0.16'), "damaged"),
        (text.replace('"format": 1', '"format": 2'), "layout 2"),
        ("[1, 2]", "is no solver"),
        ("{}", "is no solver"),
    ):
        assert damaged != text
        path.write_text(damaged, "utf-8")
        with pytest.raises(ValueError, match=message):
            load_solver(path)


# -- guards -------------------------------------------------------------------------------------
def network(scale=1.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    with torch.no_grad():
        model[0].weight.mul_(scale)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, t, condition=None):
            return 0.1 * self.inner(x)

    return EpsilonField(Net().eval(), **({"schedule": LINEAR, "shape": (1, 4, 4)} | options))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: network(1.01), "weights is"),
        (lambda: network(schedule=NoiseSchedule.cosine()), "schedule is"),
        (lambda: network(shape=(1, 8, 8)), r"shape is \[1, 8, 8\], was \[1, 4, 4\]"),
        (lambda: network(prediction="v_prediction"), "prediction is 'v_prediction', was 'epsilon'"),
        (lambda: network(clip=1.0), "clip is 1.0, was None"),
        (
            lambda: network(condition=torch.zeros(1, 2), null_condition=torch.zeros(1, 2), guidance_scale=3.0),
            "guidance_scale is 3.0, was 1.0",
        ),
    ],
)
def test_another_model_is_refused_unless_forced(other, message):
    solver = calibrate(network(), 3, n=4, refine=0, reference_nfe=60)
    field, n = other(), 2
    with pytest.raises(ValueError, match=f"calibrated for another model: .*{message}"):
        ddim_ode.sample(field, n=n, solver=solver)
    with pytest.raises(ValueError, match="calibrated for another model"):
        ddim_ode.sample(field, n=3, solver=solver, batch_size=2)
    assert field.nfe == 0
    if field.schedule.sigma_max >= solver.numbers.sigmas[0]:
        assert ddim_ode.sample(field, n=n, solver=replace(solver, force=True)).nfe == 3


def test_the_same_model_elsewhere_is_accepted():
    """Neither dtype nor conditions are what a calibration is for."""
    solver = calibrate(network(), 3, n=4, refine=0, reference_nfe=60)
    conditioned = network(condition=torch.zeros(1, 2))
    assert ddim_ode.sample(conditioned, n=2, solver=solver).success
    assert ddim_ode.sample(network(autocast=torch.bfloat16), n=2, solver=solver).success


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 10}, "nfe = 10 contradicts calibrated5, which has 5"),
        ({"steps": 4}, "steps = 4 contradicts calibrated5"),
        ({"grid": "flow"}, "calibrated5 brings its own grid"),
        ({"grid": [100.0, 1.0, 0.0]}, "calibrated5 brings its own grid"),
    ],
)
def test_what_is_named_beside_it_must_be_its_own(options, message, five, digits):
    before = digits.nfe
    with pytest.raises(ValueError, match=message):
        ddim_ode.sample(digits, n=1, solver=five, **options)
    with pytest.raises(ValueError, match="was made to sample, over its own grid, and cannot encode"):
        ddim_ode.encode(digits, torch.zeros(1, 1, 8, 8), solver=five)
    with pytest.raises(ValueError, match="runs on the grid it was calibrated on"):
        ddim_ode.integrate(digits, torch.zeros(1, 1, 8, 8), [10.0, 1.0, 0.0], five)
    assert digits.nfe == before
    own = five.own_grid(LINEAR)
    assert ddim_ode.sample(digits, n=1, solver=five, nfe=5, steps=None, grid=own).nfe == 5


def test_a_solver_knows_the_shape_it_was_made_for_where_its_model_does_not():
    make = lambda: EpsilonField.from_sigma(lambda x, sigma: 0.5 * x / (1.0 + sigma), LINEAR)
    solver = calibrate(make(), 3, latents=ddim_ode.noise((1, 4, 4), 4, 0), refine=0, reference_nfe=60, consistent=True)
    field = make()
    with pytest.raises(ValueError, match=r"calibrated for samples of shape \(1, 4, 4\), and not \(1, 9, 9\)"):
        ddim_ode.sample(field, ddim_ode.noise((1, 9, 9), 1, 0), solver=solver)
    assert field.nfe == 0
    assert ddim_ode.sample(field, ddim_ode.noise((1, 9, 9), 1, 0), solver=replace(solver, force=True)).nfe == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(4, 1, 8, 8), "seed": -1}, "seed must be"),
        ({"n": 3}, "4 trajectories at least, two to fit to and two to hold back, but got 3"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "latents must be 4 trajectories at least"),
        ({"latents": torch.zeros(4, 1, 4, 4)}, r"must have shape \(B, 1, 8, 8\)"),
        ({"latents": torch.zeros(4, 1, 8, 8), "n": 5}, "n = 5 contradicts the 4 latents given"),
        ({"images": torch.zeros(4, 1, 8, 8)}, 'leave them out, or say direction="encode"'),
        (
            {"images": torch.zeros(4, 1, 8, 8), "latents": torch.zeros(4, 1, 8, 8), "direction": "encode"},
            "give one of them",
        ),
        ({"direction": "up"}, 'direction must be "sample" or "encode"'),
        ({"nfe": 1}, "nfe, the calls of a calibrated solver, must be"),
        ({"refine": -1}, "refine, the steps of refinement, must be"),
        ({"reference_nfe": 10}, "reference_nfe must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"network": lambda x: x.flatten(1)}, "the network must have a name"),
        ({"network": nn.Flatten(), "direction": "encode"}, "encoding makes latents: leave it out"),
    ],
)
def test_bad_input_is_refused_before_any_model_call(options, message, digits):
    before = digits.nfe
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(digits, **options)
    assert digits.nfe == before


def test_a_field_that_clips_cannot_be_calibrated_to_encode():
    field = network(clip=1.0)
    with pytest.raises(ValueError, match="clips or thresholds the predicted data cannot encode"):
        calibrate(field, 4, n=4, direction="encode")
    assert field.nfe == 0


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_two_calls_are_enough(direction, digits):
    """By the default of encoding they are one step, with no level to move."""
    found = calibrate(digits, 2, n=4, refine=1, reference_nfe=160, direction=direction)
    assert found.numbers.steps == 2


def test_a_reference_that_does_not_converge_says_by_how_much():
    field = EpsilonField.from_sigma(
        lambda x, sigma: 30.0 * torch.cos(torch.as_tensor(3000.0 * sigma) + x), LINEAR, shape=(3,)
    )
    with pytest.raises(
        ValueError, match=r"does not converge, .*: at 40 and 20 calls its two resolutions differ by \S+ RMS"
    ):
        calibrate(field, 5, n=4, reference_nfe=40)


def test_a_reference_that_more_calls_do_not_help_is_not_tried_for_long():
    variance = torch.logspace(-8, 0, 6, dtype=torch.float64)
    field = EpsilonField.from_sigma(GaussianEpsilon(torch.zeros(6), torch.diag(variance)), LINEAR, shape=(6,))
    with pytest.raises(ValueError, match=r"does not converge: at 800 and 400 calls .* 400 calls were hardly worse"):
        calibrate(field, 5, n=4, direction="encode")


@pytest.mark.parametrize(
    ("nfe", "given", "expected"), [(16, "images", [800, 400]), (20, "n", [1600, 800])], ids=["images", "latents"]
)
def test_a_reference_that_tells_too_little_is_made_anew_in_twice_the_calls(nfe, given, expected):
    """And says what all of them cost; a number that was given is not changed."""
    variance = torch.logspace(-3, 0, 6, dtype=torch.float64)
    field = EpsilonField.from_sigma(GaussianEpsilon(torch.zeros(6), torch.diag(variance)), LINEAR, shape=(6,))
    options = {"direction": "encode", "refine": 0}
    options |= {"n": 6} if given == "n" else {"images": ddim_ode.noise((6,), 6, 0) * variance.sqrt()}
    made = calibrate(field, nfe, **options)
    known, tries = made.record["reference"], [400 * 2**k for k in range(expected[0] // 800 + 1)]
    assert known["nfe"] == expected
    assert known["calls"] == 6 * sum(calls + calls // 2 for calls in tries)
    assert known["rms_difference"] < 0.2 * made.record["stages"][0]["held_back"]
    with pytest.raises(ValueError, match=r"at 400 and 200 calls .*: give a larger reference_nfe"):
        calibrate(field, nfe, reference_nfe=400, **options)


def test_a_reference_has_four_times_the_calls_at_least(monkeypatch):
    monkeypatch.setattr(study, "REFERENCE_NFE", 20)
    field = EpsilonField.from_sigma(lambda x, sigma: 0.0 * x, LINEAR, shape=(3,))
    assert calibrate(field, 4, n=4).record["reference"]["nfe"] == [20, 10]
    assert calibrate(field, 6, n=4).record["reference"]["nfe"] == [24, 12]


def test_trajectories_that_fail_are_dropped_and_counted(digits):
    def spoilt(x, sigma):
        eps = digits(x, sigma)
        return torch.where(x[:, :, :1, :1] > 1000.0, torch.nan, eps)

    field = EpsilonField.from_sigma(spoilt, LINEAR, shape=(1, 8, 8))
    latents = ddim_ode.noise((1, 8, 8), 6, 0).clone()
    latents[2, 0, 0, 0] = 50.0
    solver = calibrate(field, 4, latents=latents, refine=0, reference_nfe=80)
    assert solver.record["trajectories"] == {"fitted": 3, "held_back": 2, "dropped": [2]}
    latents[3:, 0, 0, 0] = 50.0
    with pytest.raises(ValueError, match="4 of 6 reference trajectories are not finite, and 4 at least are needed"):
        calibrate(field, 4, latents=latents, refine=0, reference_nfe=80)


# -- where it runs ------------------------------------------------------------------------------
def test_it_runs_on_fake_cuda(five):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty((2, 1, 8, 8), dtype=torch.float64, device="cuda")
        field = EpsilonField.from_sigma(lambda x, sigma: 0.5 * x, LINEAR, shape=(1, 8, 8))
        run = ddim_ode.integrate(field, x, five.own_grid(LINEAR), five)
        assert run.x_bar.device.type == "cuda"
        assert run.x_bar.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_and_cpu_find_the_same():
    field, _ = gaussian(16)
    latents = ddim_ode.noise((16,), 8, 0)
    a = calibrate(field, 4, latents=latents, refine=1)
    b = calibrate(field, 4, latents=latents.cuda(), refine=1)
    np.testing.assert_allclose(a.numbers.propagators, b.numbers.propagators, rtol=1e-6)


def test_gradients_flow_through_it(five, digits):
    latent = ddim_ode.noise((1, 8, 8), 1, 0).requires_grad_()
    run = ddim_ode.sample(digits, latent, solver=five, gradients=True)
    (gradient,) = torch.autograd.grad(run.x.sum(), latent)
    h = 1e-5
    direction = torch.ones_like(latent)
    ends = [ddim_ode.sample(digits, latent.detach() + s * h * direction, solver=five).x.sum() for s in (1.0, -1.0)]
    assert float((gradient * direction).sum()) == pytest.approx(float((ends[0] - ends[1]) / (2.0 * h)), rel=1e-5)
