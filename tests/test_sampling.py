"""sample, encode, decode, round_trip, interpolate."""

import warnings

import numpy as np
import pytest
import torch

import ddim_ode
from ddim_ode import EpsilonField, Grid, NoiseSchedule, Status
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.sampling import DEFAULTS, LatentWarning, slerp

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)
EXACT = GaussianEpsilon(torch.full(SHAPE, 0.1), torch.linspace(0.01, 0.2, 64).reshape(SHAPE))
FIELD = EpsilonField.from_sigma(EXACT, LINEAR, shape=SHAPE)
LATENT = ddim_ode.noise(SHAPE, 3, seed=1)
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def exact_samples(latent):
    end = LINEAR.sigma_max
    return EXACT.solution(latent * np.sqrt(1 + end**2), end, 0.0)


def test_sampling_solves_the_equation():
    run = ddim_ode.sample(FIELD, LATENT, nfe=400, solver="ab3-rk")
    torch.testing.assert_close(run.x, exact_samples(LATENT), atol=1e-4, rtol=0)
    assert run.x.dtype == torch.float64
    assert run.nfe <= 400


def test_encoding_undoes_it():
    code = ddim_ode.encode(FIELD, exact_samples(LATENT), nfe=400, data_range=None)
    torch.testing.assert_close(code.x, LATENT, atol=1e-2, rtol=0)
    assert code.grid.sigmas[-1] == LINEAR.sigma_max


def test_round_trip_reports_the_papers_error():
    trip = ddim_ode.round_trip(FIELD, IMAGES, nfe=20, solver="ddim", grid="linear")
    there = ddim_ode.encode(FIELD, IMAGES, nfe=20, solver="ddim", grid="linear")
    torch.testing.assert_close(trip.latent, there.x)
    back = ddim_ode.decode(FIELD, trip.latent, nfe=20, solver="ddim", grid="linear")
    torch.testing.assert_close(trip.reconstruction, back.x)
    by_hand = ((IMAGES / 2 - trip.reconstruction / 2) ** 2).reshape(3, -1).mean(1)
    torch.testing.assert_close(trip.mse, by_hand)
    assert trip.nfe == 40
    assert trip.status == (Status.SUCCESS,) * 3


def test_defaults_are_used_each_way():
    run = ddim_ode.sample(FIELD, LATENT, nfe=10)
    solver, rule, options = DEFAULTS["sample"]
    grid = Grid.make(rule, LINEAR, 10, **options)
    torch.testing.assert_close(run.x, ddim_ode.sample(FIELD, LATENT, solver=solver, grid=grid).x, rtol=0, atol=0)
    code = ddim_ode.encode(FIELD, IMAGES, nfe=10)
    solver, rule, options = DEFAULTS["encode"]
    grid = Grid.make(rule, LINEAR, 9, **options)  # and one call for the slope it begins with
    torch.testing.assert_close(code.x, ddim_ode.encode(FIELD, IMAGES, solver=solver, grid=grid).x, rtol=0, atol=0)


def test_budgets_buy_whole_steps():
    assert ddim_ode.sample(FIELD, LATENT, nfe=11, solver="heun").nfe == 10
    assert ddim_ode.sample(FIELD, LATENT, nfe=11, solver="heun").grid.steps == 5
    assert ddim_ode.sample(FIELD, LATENT, steps=11, solver="heun").nfe == 22
    assert ddim_ode.sample(FIELD, LATENT, nfe=12, solver="ab4-rk").grid.steps == 6
    assert ddim_ode.sample(FIELD, LATENT).nfe == 50


def test_a_grid_may_be_a_name_a_grid_or_numbers_in_either_direction():
    grid = Grid.make("karras", LINEAR, 8)
    runs = [
        ddim_ode.sample(FIELD, LATENT, grid="karras", steps=8, solver="ab2"),
        ddim_ode.sample(FIELD, LATENT, grid=grid, solver="ab2"),
        ddim_ode.sample(FIELD, LATENT, grid=grid.reversed(), solver="ab2"),
        ddim_ode.sample(FIELD, LATENT, grid=grid.sigmas.tolist(), solver="ab2"),
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run.x, runs[0].x, rtol=0, atol=0)


def test_a_seed_and_an_index_make_an_image():
    all_at_once = ddim_ode.sample(FIELD, n=5, seed=7, nfe=6)
    one_by_one = ddim_ode.sample(FIELD, n=5, seed=7, nfe=6, batch_size=1)
    torch.testing.assert_close(one_by_one.x, all_at_once.x, rtol=1e-12, atol=1e-12)
    fewer = ddim_ode.sample(FIELD, n=2, seed=7, nfe=6)
    torch.testing.assert_close(fewer.x, all_at_once.x[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ddim_ode.noise(SHAPE, 2, 7, first=3), ddim_ode.noise(SHAPE, 5, 7)[3:], rtol=0, atol=0)
    single = ddim_ode.noise(SHAPE, 2, 7, dtype=torch.float32)
    torch.testing.assert_close(single, ddim_ode.noise(SHAPE, 2, 7).float(), rtol=0, atol=0)
    assert not torch.equal(ddim_ode.noise(SHAPE, 1, 7), ddim_ode.noise(SHAPE, 1, 8))


def test_conditions_follow_their_samples_through_batches():
    condition = torch.arange(5.0, dtype=torch.float64)
    field = EpsilonField(lambda x, t, c: c.reshape(-1, 1, 1, 1) * torch.ones_like(x), LINEAR, condition=condition)
    latent = ddim_ode.noise(SHAPE, 5, 0)
    whole = ddim_ode.sample(field, latent, nfe=4)
    parts = ddim_ode.sample(field, latent, nfe=4, batch_size=2)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-13, atol=1e-12)


def test_conditions_follow_a_failed_sample_into_its_second_run():
    # The second of five in batches of two; and the second of the second batch.
    condition = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])

    def model(x, t, c):
        c = c.reshape(-1, 1, 1, 1)
        return torch.where((c > 0.5) & (t.reshape(-1, 1, 1, 1) < 300.0), torch.nan, 0.1 * x)

    field = EpsilonField(model, LINEAR, condition=condition)
    latent = ddim_ode.noise(SHAPE, 5, 0)
    for batch_size in (None, 2):
        run = ddim_ode.sample(field, latent, nfe=10, solver="ddim", grid="linear", batch_size=batch_size)
        assert [bool(s) for s in run.status] == [False, True, False, True, False]
        assert [run.sigma[i] for i in (1, 3)] == pytest.approx([LINEAR.sigma(300)] * 2)
    start = latent[[0, 1]] * LINEAR.sigma_max
    for rows in (slice(0, None, 3), slice(2, None, 1), torch.tensor([4, 3])):
        part = condition[rows][:2]
        if part.numel() == len(condition[rows]):
            run = ddim_ode.integrate(field, start, ddim_ode.Grid.make("linear", LINEAR, 10), rows=rows)
            for i, c in enumerate(part.tolist()):
                assert run.sigma[i] == pytest.approx(LINEAR.sigma(300) if c else 0.0)


def test_conditions_that_do_not_fit_are_refused_before_any_call():
    field = EpsilonField(lambda x, t, c: x, LINEAR, condition=torch.zeros(3))
    with pytest.raises(ValueError, match="condition has 3 rows, but the batch has 5"):
        ddim_ode.sample(field, ddim_ode.noise(SHAPE, 5, 0), nfe=4, batch_size=2)
    assert field.nfe == 0


def test_seeds_use_all_their_bits():
    assert not torch.equal(ddim_ode.noise(SHAPE, 1, 2**63), ddim_ode.noise(SHAPE, 1, 2**63 + 1))
    assert torch.equal(ddim_ode.noise(SHAPE, np.int64(1), torch.tensor(3)), ddim_ode.noise(SHAPE, 1, 3))


def test_one_named_solver_runs_on_one_grid_both_ways():
    trip = ddim_ode.round_trip(FIELD, IMAGES, nfe=8, solver="ddim")
    assert trip.decoding.grid == trip.encoding.grid.reversed()


def test_a_grid_that_does_not_end_at_the_data_scales_both_ends():
    trip = ddim_ode.round_trip(FIELD, IMAGES, grid=np.geomspace(0.5, 3.0, 200), solver="ab4-rk")
    assert float(trip.mse.max()) < 1e-10


def test_a_failed_round_trip_has_no_error_to_report():
    def eps(x_bar, sigma):
        bad = (x_bar[:, :1, :1, :1] > 0.9) & (sigma < 1.0)
        return torch.where(bad, torch.nan, EXACT(x_bar, sigma))

    images = IMAGES.clone() * 0.5
    images[1, 0, 0, 0] = 0.99
    trip = ddim_ode.round_trip(EpsilonField.from_sigma(eps, LINEAR), images, nfe=8, solver="ddim")
    assert trip.status[1] is Status.NONFINITE
    assert bool(trip.mse[1].isnan())


def test_interpolation_is_spherical():
    a, b = ddim_ode.noise(SHAPE, 2, 0), ddim_ode.noise(SHAPE, 2, 5)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    unit_a, unit_b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(slerp(unit_a, unit_b, 0.5), torch.full((1, 2), 0.5**0.5))
    torch.testing.assert_close(slerp(unit_a, unit_a, 0.3), unit_a)
    run = ddim_ode.interpolate(FIELD, a, b, 3, nfe=10)
    assert run.x.shape == (6, *SHAPE)
    torch.testing.assert_close(run.x[0::3], ddim_ode.sample(FIELD, a, nfe=10).x)
    torch.testing.assert_close(run.x[2::3], ddim_ode.sample(FIELD, b, nfe=10).x)
    torch.testing.assert_close(run.x[1::3], ddim_ode.sample(FIELD, slerp(a, b, 0.5), nfe=10).x)


def test_an_image_passed_as_a_latent_is_warned_about():
    with pytest.warns(LatentWarning, match="is it an image"):
        ddim_ode.sample(FIELD, IMAGES, nfe=2)
    with pytest.warns(LatentWarning, match="standard deviation"):
        ddim_ode.sample(FIELD, 20 * LATENT, nfe=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddim_ode.sample(FIELD, n=200, seed=3, nfe=1)
        ddim_ode.sample(FIELD, ddim_ode.noise(SHAPE, 200, 3), nfe=1)


def test_callbacks_are_told_which_samples_they_see():
    seen = []
    run = ddim_ode.sample(FIELD, n=5, steps=3, batch_size=2, callback=lambda step: seen.append((step.rows, step.x_bar)))
    assert len(seen) == 9
    for rows, x_bar in seen[2::3]:
        torch.testing.assert_close(x_bar, run.x_bar[rows], rtol=0, atol=0)
    ddim_ode.sample(FIELD, n=5, steps=1, callback=lambda step: seen.append(step.rows))
    assert seen[-1] is None


def test_a_callback_stops_its_own_batch_only():
    """Batches are runs of their own: each is stopped at its third step or by its own samples, or goes on."""

    def stop(step):
        return step.rows == slice(2, 4) and step.index == 2

    options = {"steps": 6, "solver": "ab2", "trajectory": True, "dense": True, "save_at": [LINEAR.sigma_max, 0.0]}
    run = ddim_ode.sample(FIELD, n=5, batch_size=2, callback=stop, **options)
    whole = ddim_ode.sample(FIELD, n=5, batch_size=2, **options)
    stopped, others = [2, 3], [0, 1, 4]
    sigmas = run.grid.sigmas
    assert run.status == tuple(Status.STOPPED if i in stopped else Status.SUCCESS for i in range(5))
    assert run.sigma == tuple(sigmas[3] if i in stopped else 0.0 for i in range(5))
    assert run.nfe == 6
    # One trajectory for all, NaN where a batch did not get so far; and the same of dense output.
    assert run.trajectory.shape == whole.trajectory.shape
    assert torch.equal(run.trajectory[:, others], whole.trajectory[:, others])
    assert torch.equal(run.trajectory[:4, stopped], whole.trajectory[:4, stopped])
    assert bool(run.trajectory[4:, stopped].isnan().all())
    assert torch.equal(run.saved[:, others], whole.saved[:, others])
    assert torch.equal(run.saved[0], whole.saved[0])
    assert bool(run.saved[1, stopped].isnan().all())
    assert bool(run.out(sigmas[5])[stopped].isnan().all())
    torch.testing.assert_close(run.out(sigmas[2]), whole.out(sigmas[2]), rtol=0, atol=0)
    assert torch.equal(run.x_bar[stopped], whole.trajectory[3, stopped])
    torch.testing.assert_close(run.x[stopped], run.x_bar[stopped] * (1.0 + sigmas[3] ** 2) ** -0.5)
    torch.testing.assert_close(run.x[others], whole.x[others])


def test_all_batches_stopped_alike_have_a_short_trajectory():
    run = ddim_ode.sample(FIELD, n=3, steps=6, batch_size=1, trajectory=True, callback=lambda step: step.index == 1)
    assert run.trajectory.shape[:2] == (3, 3)
    assert run.nfe == 2
    assert not bool(run.trajectory.isnan().any())
    single = ddim_ode.sample(FIELD, n=3, steps=6, batch_size=1, trajectory=True, dtype=torch.float32)
    assert single.trajectory.dtype == torch.float32


def test_a_field_that_clips_does_not_encode():
    for bounds in ({"clip": 1.0}, {"threshold": 0.99}):
        field = EpsilonField.from_sigma(EXACT, LINEAR, shape=SHAPE, **bounds)
        for call in (
            lambda field: ddim_ode.encode(field, IMAGES, nfe=4),
            lambda field: ddim_ode.round_trip(field, IMAGES, nfe=4),
            lambda field: ddim_ode.integrate(field, LATENT, [0.0, 1.0]),
        ):
            with pytest.raises(ValueError, match="clips or thresholds the predicted data cannot encode"):
                call(field)
        assert field.nfe == 0
        assert ddim_ode.sample(field, LATENT, nfe=4).success
        assert ddim_ode.interpolate(field, LATENT[:1], LATENT[1:2], 2, nfe=4).success


def test_a_run_says_which_solver_made_it():
    assert ddim_ode.sample(FIELD, n=1, nfe=3).solver == ddim_ode.sampling.DEFAULTS["sample"][0]
    assert ddim_ode.encode(FIELD, IMAGES, nfe=3, solver="ab3-rk", batch_size=1).solver == "ab3-rk"


def test_an_inner_state_is_no_latent_and_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddim_ode.sample(FIELD, 0.5 * IMAGES, grid=[0.1, 0.05, 0.0])


def test_an_error_of_images_that_require_grad_is_a_number():
    assert not ddim_ode.round_trip(FIELD, IMAGES.clone().requires_grad_(), nfe=4).mse.requires_grad


OWN = exact_samples(LATENT)  # images of the model's own


@pytest.fixture(scope="module")
def one_way():
    """Solvers of four calls up and of three down."""
    options = {"n": 4, "refine": 0, "reference_nfe": 160}
    up = ddim_ode.calibrate(FIELD, 4, direction="encode", **options)
    return up, ddim_ode.calibrate(FIELD, 3, **options)


def test_a_round_trip_goes_there_by_one_solver_and_back_by_another(one_way):
    up, down = one_way
    trip = ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=up, back=down)
    there = ddim_ode.encode(FIELD, OWN, data_range=None, solver=up)
    torch.testing.assert_close(trip.latent, there.x, rtol=0, atol=0)
    back = ddim_ode.decode(FIELD, there.x, solver=down).x
    torch.testing.assert_close(trip.reconstruction, back, rtol=0, atol=0)
    assert (trip.encoding.solver, trip.decoding.solver, trip.nfe) == ("calibrated-encode4", "calibrated3", 7)
    # Of a solver that keeps two states what is named for the way back has the latent alone.
    trip = ddim_ode.round_trip(FIELD, OWN, data_range=None, solver="alf", back="ab2", grid="linear", nfe=8)
    there = ddim_ode.encode(FIELD, OWN, data_range=None, solver="alf", grid="linear", nfe=8)
    back = ddim_ode.sample(FIELD, there.x, solver="ab2", grid="linear", nfe=8).x
    torch.testing.assert_close(trip.reconstruction, back, rtol=0, atol=0)
    alone = ddim_ode.round_trip(FIELD, OWN, data_range=None, solver="alf", back="alf", nfe=8)
    assert alone.mse.max() > 1e-8 > ddim_ode.round_trip(FIELD, OWN, data_range=None, solver="alf", nfe=8).mse.max()


def test_a_solver_of_one_way_leaves_the_other_to_the_default(one_way):
    up, down = one_way
    trip = ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=up)
    assert (trip.encoding.solver, trip.decoding.solver) == (up.name, DEFAULTS["sample"].solver)
    trip = ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=down, nfe=3)
    assert (trip.encoding.solver, trip.decoding.solver) == (DEFAULTS["encode"].solver, down.name)
    back = ddim_ode.sample(FIELD, ddim_ode.encode(FIELD, OWN, data_range=None, nfe=3).x, solver=down).x
    torch.testing.assert_close(trip.reconstruction, back, rtol=0, atol=0)


def test_ways_that_cannot_be_gone_are_refused_before_any_call(one_way):
    up, down = one_way
    other = EpsilonField(lambda x, t: x, LINEAR, shape=SHAPE)
    clipping = EpsilonField.from_sigma(EXACT, LINEAR, shape=SHAPE, clip=1.0)
    latent = ddim_ode.encode(FIELD, OWN, data_range=None, solver=up).x
    before = FIELD.nfe
    for call, says in (
        (lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=down, back=down), "was made to sample"),
        (lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, solver="ddim", back=up), "was made to encode"),
        (
            lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=up, nfe=5),
            "nfe = 5 contradicts calibrated-encode4",
        ),
        (
            lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, solver=up, back=down, nfe=4),
            "nfe = 4 contradicts calibrated3",
        ),
        (lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, back=down, grid="linear"), "brings its own grid"),
        (lambda: ddim_ode.round_trip(FIELD, OWN, data_range=None, back="dopri5", nfe=8), "no budget of steps or nfe"),
        (
            lambda: ddim_ode.round_trip(other, OWN, data_range=None, back=down),
            "calibrated for another model: coordinates is",
        ),
        (
            lambda: ddim_ode.round_trip(other, OWN, data_range=None, solver=up),
            "calibrated for another model: coordinates is",
        ),
        (lambda: ddim_ode.decode(clipping, latent, solver=down), "calibrated for another model: clip is"),
        (lambda: ddim_ode.interpolate(FIELD, latent[:1], latent[1:2], 3, solver=up), "was made to encode"),
        (lambda: ddim_ode.log_density(FIELD, OWN, solver=up), "begins at sigma = 0 and not where data"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert FIELD.nfe == before
    assert other.nfe == clipping.nfe == 0


def test_float32_states():
    run = ddim_ode.sample(FIELD, LATENT, nfe=10, dtype=torch.float32)
    assert run.x.dtype == torch.float32
    torch.testing.assert_close(run.x.double(), ddim_ode.sample(FIELD, LATENT, nfe=10).x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ddim_ode.sample(FIELD), ValueError, "latent=, or n="),
        (lambda: ddim_ode.sample(FIELD, LATENT, n=4), ValueError, "n = 4 contradicts the 3 latents"),
        (lambda: ddim_ode.sample(FIELD, n=0), ValueError, "n must be a whole number"),
        (lambda: ddim_ode.sample(FIELD, n=2, seed=-1), ValueError, "seed must be"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=0), ValueError, "nfe = 0 does not pay for one step"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=3, solver="rk4"), ValueError, "rk4, which takes 4 calls"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=2.5), ValueError, "nfe must be a whole number"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=5, steps=5), ValueError, "give one of them"),
        (lambda: ddim_ode.sample(FIELD, n=2, steps=5, grid=[3.0, 1.0, 0.0]), ValueError, "steps = 5 contradicts"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=1, grid=[3.0, 1.0, 0.0]), ValueError, "does not pay for the 2 steps"),
        (lambda: ddim_ode.sample(FIELD, n=2, grid="karas"), ValueError, "did you mean karras"),
        (lambda: ddim_ode.sample(FIELD, n=2, solver="dpmpp4m"), ValueError, "did you mean dpmpp"),
        (lambda: ddim_ode.sample(FIELD, n=2, batch_size=0), ValueError, "batch_size"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=float("nan")), ValueError, "nfe must be a whole number"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=[5]), ValueError, "nfe must be a whole number"),
        (lambda: ddim_ode.sample(FIELD, n=2, dtype=torch.int32), TypeError, "floating dtype"),
        (lambda: ddim_ode.sample(EXACT, n=2), TypeError, "EpsilonField"),
        (lambda: ddim_ode.sample(EpsilonField(torch.sin, LINEAR), n=2), ValueError, "shape"),
        (lambda: ddim_ode.sample(FIELD, LATENT[:, 0]), ValueError, r"latent must have shape \(B, 1, 8, 8\)"),
        (lambda: ddim_ode.sample(FIELD, LATENT * torch.inf), ValueError, "latent must be finite"),
        (lambda: ddim_ode.encode(FIELD, IMAGES * 2), ValueError, r"images must lie in \[-1, 1\]"),
        (lambda: ddim_ode.encode(FIELD, (IMAGES * 100).to(torch.uint8)), TypeError, "127.5"),
        (lambda: ddim_ode.encode(FIELD, IMAGES.clone().fill_(torch.nan)), ValueError, "images must be finite"),
        (lambda: ddim_ode.interpolate(FIELD, LATENT, LATENT[:2]), ValueError, "one shape"),
        (lambda: ddim_ode.interpolate(FIELD, LATENT, LATENT, 1), ValueError, "at least 2"),
        (lambda: ddim_ode.interpolate(FIELD, 0 * LATENT, LATENT), ValueError, "zeros"),
        (lambda: slerp(LATENT.float(), -LATENT.float(), 0.5), ValueError, "opposite"),
        (lambda: ddim_ode.sample(FIELD, n=2, nfe=2.5, grid=[3.0, 1.0, 0.0]), ValueError, "nfe must be a whole number"),
        (lambda: ddim_ode.sample(FIELD, [[1.0]], n=4), TypeError, "torch tensor"),
        (lambda: ddim_ode.noise(SHAPE, 1, 0, first=-1), ValueError, "first must be"),
        (lambda: ddim_ode.encode(FIELD, IMAGES, data_range=(0.0, 0.0)), ValueError, "two numbers that rise"),
        (lambda: ddim_ode.interpolate(FIELD, LATENT, -LATENT), ValueError, r"a\[\d\] and b\[\d\] point in opposite"),
    ],
)
def test_bad_input_is_refused_before_any_call(call, error, says):
    calls = FIELD.nfe
    with pytest.raises(error, match=says):
        call()
    assert FIELD.nfe == calls


def test_solvers_describe_themselves():
    names = [s.name for s in ddim_ode.solvers()]
    wanted = [
        "ddim",
        "pf-euler",
        "ab2",
        "ab3",
        "ab4",
        "deis2",
        "deis3",
        "deis4",
        "dpmpp2m",
        "dpmpp3m",
        "midpoint",
        "heun",
        "kutta3",
        "rk4",
    ]
    assert set(wanted) <= set(names)
    for solver in ddim_ode.solvers():
        assert solver.order >= 1
        assert solver.nfe_per_step >= 1
        assert solver.source
