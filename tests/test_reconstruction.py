"""The reconstruction study: its rows against runs by hand, and what it does where something fails."""

import math

import pytest
import torch

import ddim_ode
from ddim_ode import EpsilonField, Grid, NoiseSchedule, Status
from ddim_ode.comparison import Reference
from ddim_ode.metrics import mse, rms
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.reconstruction import reconstruct, reference_latents

LINEAR = NoiseSchedule.linear()
EXACT = GaussianEpsilon(torch.tensor([[[0.2, -0.4]]]), torch.tensor([0.3, 0.02]))
FIELD = EpsilonField.from_sigma(EXACT, LINEAR, shape=EXACT.shape)
LATENT = ddim_ode.noise(EXACT.shape, 3, 0)
TOP = LINEAR.sigma_max
IMAGES = EXACT.solution(LATENT * math.sqrt(1 + TOP**2), TOP, 0.0)
KNOWN = Reference(LATENT, 0.0, 0, ("known",))


def study(solvers, budgets, **options):
    return reconstruct(FIELD, IMAGES, solvers, budgets, exact=KNOWN, data_range=None, **options)


def test_rows_are_what_runs_by_hand_give():
    found = study(["ddim", "alf"], [10])
    ddim, alf = found.record["rows"]
    there = ddim_ode.encode(FIELD, IMAGES, nfe=10, solver="ddim", data_range=None)
    back = ddim_ode.sample(FIELD, there.x, nfe=10, solver="ddim")
    torch.testing.assert_close(torch.tensor(ddim["each"]["latent_rms"], dtype=torch.float64), rms(there.x, LATENT))
    torch.testing.assert_close(torch.tensor(ddim["each"]["round_trip_mse"], dtype=torch.float64), mse(IMAGES, back.x))
    assert ddim["each"]["alone_mse"] == ddim["each"]["round_trip_mse"]
    assert ddim["round_trip_mse"] == pytest.approx(float(mse(IMAGES, back.x).mean()))
    decoded = ddim_ode.sample(FIELD, LATENT, nfe=10, solver="ddim").x
    assert ddim["decode_rms"] == pytest.approx(float(rms(decoded, IMAGES).square().mean().sqrt()))
    assert (ddim["states"], ddim["encode_calls"], ddim["decode_calls"], ddim["growth"]) == (1, 10, 10, None)
    assert (alf["states"], alf["encode_calls"], alf["decode_calls"]) == (2, 10, 9)
    assert alf["round_trip_mse"] < 1e-24 < 1e-10 < alf["alone_mse"]
    assert 1e-16 < alf["float32_mse"] < 1e-8
    # What an error of the second state comes back as, by hand.
    there = ddim_ode.encode(FIELD, IMAGES, nfe=10, solver="alf", data_range=None)
    push = 1.0 + 1e-6 * ddim_ode.noise(EXACT.shape, 3, 0)
    ways = [
        ddim_ode.sample(FIELD, there.x, solver="alf", grid=there.grid, second=second).x
        for second in (there.second, there.second * push)
    ]
    assert alf["growth"] == pytest.approx(float(rms(*ways).square().mean().sqrt()) / 1e-6, rel=1e-3)
    assert torch.equal(found.reconstructions["ddim", 10], back.x)
    assert found.encodings["alf", 10].second is not None


def test_the_default_goes_back_by_both_states_and_alone_by_the_default_of_sampling():
    (row,) = study(["default"], [12]).record["rows"]
    there = ddim_ode.encode(FIELD, IMAGES, nfe=12, data_range=None)
    alone = ddim_ode.sample(FIELD, there.x, nfe=12)
    assert row["round_trip_mse"] < 1e-24
    assert row["alone_mse"] == pytest.approx(float(mse(IMAGES, alone.x).mean()))
    assert row["grid"] == "flow-up"


def test_iterative_and_adaptive_methods_have_rows_of_their_own_kind():
    rows = study(["inverse-ddim", "dopri5", "rk4"], [3, 6]).record["rows"]
    named = [(row["solver"], row["nfe"]) for row in rows]
    assert named == [("inverse-ddim", 3), ("inverse-ddim", 6), ("dopri5", None), ("rk4", 3), ("rk4", 6)]
    inverse = rows[1]
    assert inverse["steps"] == 6
    assert inverse["encode_calls"] > inverse["decode_calls"] == 6
    assert max(inverse["residual"]) < 1e-7
    assert inverse["round_trip_mse"] < 1e-13
    assert rows[3]["latent_rms"] is None  # three calls do not pay for a step


def test_errors_along_the_way_begin_at_nothing_and_end_at_those_of_the_ends():
    found = study(["ddim", "alf"], [8], along=8).record
    for row, whole in zip(found["along"]["rows"], found["rows"], strict=True):
        assert row["encode"]["rms"][0] == 0.0
        assert row["encode"]["rms"][-1] == pytest.approx(whole["latent_rms"], rel=1e-5)
        assert row["decode"]["rms"][0] == pytest.approx(whole["latent_rms"], rel=1e-5)
        assert row["encode"]["sigmas"] == row["decode"]["sigmas"][::-1]


def test_a_reference_is_made_where_latents_are_not_known():
    found = reference_latents(FIELD, IMAGES, data_range=None)
    assert found.difference < 1e-8
    torch.testing.assert_close(found.x, LATENT, rtol=0, atol=1e-7)
    (row,) = reconstruct(FIELD, IMAGES, ["ddim"], [10], data_range=None).record["rows"]
    assert row["latent_rms"] == pytest.approx(study(["ddim"], [10]).record["rows"][0]["latent_rms"], rel=1e-6)


def test_an_image_that_is_not_finite_fails_alone():
    spoilt = IMAGES.clone()
    spoilt[1] = torch.nan
    run = ddim_ode.encode(FIELD, spoilt, nfe=10, data_range=None)
    assert run.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    assert run.sigma[1] == 0.0
    assert run.x_bar.isfinite().all()
    well = ddim_ode.encode(FIELD, IMAGES, nfe=10, data_range=None)
    assert torch.equal(run.x[[0, 2]], well.x[[0, 2]])
    trip = ddim_ode.round_trip(FIELD, spoilt, nfe=10, data_range=None)
    assert trip.mse.isnan().tolist() == [False, True, False]
    row = reconstruct(FIELD, spoilt, ["alf"], [10], exact=KNOWN, data_range=None).record["rows"][0]
    assert row["failed"] == [1]
    assert math.isnan(row["each"]["round_trip_mse"][1])
    other = ddim_ode.encode(FIELD, IMAGES[[0, 2]], nfe=10, solver="alf", data_range=None)
    assert row["latent_rms"] == pytest.approx(float(rms(other.x, LATENT[[0, 2]]).square().mean().sqrt()))
    with pytest.raises(ValueError, match="images must be finite"):
        ddim_ode.encode(FIELD, torch.full_like(IMAGES, torch.nan), nfe=10, data_range=None)


def test_bad_requests_come_before_any_call():
    calls = FIELD.nfe
    for solvers, budgets, says in (
        ([], [10], "at least one solver"),
        (["ddim"], [], "at least one"),
        (["nothing"], [10], "unknown solver"),
        (["ddim"], [2000], "distinct times"),
    ):
        with pytest.raises(ValueError, match=says):
            study(solvers, budgets)
    with pytest.raises(ValueError, match="unknown grid"):
        study(["ddim"], [10], grid="nothing")
    with pytest.raises(ValueError, match="no budget of nfe"):
        ddim_ode.round_trip(FIELD, IMAGES, nfe=10, solver="inverse-ddim", data_range=None)
    assert FIELD.nfe == calls


def test_mean_squared_errors_fall_at_twice_the_order():
    rows = study(["ddim", "abm3"], [50, 100, 200]).record["rows"]
    errors = {name: [row["round_trip_mse"] for row in rows if row["solver"] == name] for name in ("ddim", "abm3")}
    assert 0.5 * math.log2(errors["ddim"][0] / errors["ddim"][-1]) == pytest.approx(2.0, abs=0.3)
    assert 0.5 * math.log2(errors["abm3"][0] / errors["abm3"][-1]) > 4.0


def test_flow_up_is_flow_with_numbers_of_its_own():
    grid = Grid.make("flow-up", LINEAR, 9)
    other = Grid.make("flow", LINEAR, 9, c=1.0 + 0.18 * 3.0, rho=2.9)
    assert grid.sigmas.tolist() == other.sigmas.tolist()


def test_nothing_of_a_neighbour_stands_in_for_an_image_that_failed():
    spoilt = IMAGES.clone()
    spoilt[1, 0, 0, 0] = torch.inf
    run = ddim_ode.encode(
        FIELD, spoilt, nfe=8, data_range=None, trajectory=True, dense=True, save_at=[1.0], batch_size=2
    )
    assert run.trajectory[:, 1].isnan().all()
    assert run.saved[:, 1].isnan().all()
    assert run.out(0.5)[1].isnan().all()
    assert (run.second[1] == 0.0).all()
    assert run.out(0.5)[[0, 2]].isfinite().all()


def test_budgets_that_pay_for_nothing_are_refused():
    with pytest.raises(ValueError, match="no budget of 5 calls pays for one step of mf-rk4"):
        study(["mf-rk4"], [5])
    rows = study(["default", "ddim"], [1]).record["rows"]
    assert [row["latent_rms"] is None for row in rows] == [True, False]
    assert rows[0].keys() <= rows[1].keys()


def test_calibrated_solvers_go_their_way_and_the_default_the_other():
    options = {"n": 4, "refine": 0, "reference_nfe": 400}
    up, down = (ddim_ode.calibrate(FIELD, 5, direction=way, **options) for way in ("encode", "sample"))
    other = ddim_ode.calibrate(FIELD, 5, seed=1, **options)
    found = study([up, down, down, other, "ddim"], [4, 5], along=5)
    rows = {(row["solver"], row["nfe"]): row for row in found.record["rows"]}
    assert {name for name, _ in rows} == {"calibrated-encode5", "calibrated5", "calibrated5 (2)", "ddim"}
    for name in ("calibrated-encode5", "calibrated5", "calibrated5 (2)"):
        assert {value for key, value in rows[name, 4].items() if key not in ("solver", "nfe")} == {None}
        assert rows[name, 4].keys() == rows["ddim", 5].keys()
    ways = {name: (rows[name, 5]["encoder"], rows[name, 5]["decoder"]) for name, _ in rows}
    assert ways == {
        "calibrated-encode5": ("calibrated-encode5", "flowdown5"), "calibrated5": ("alf-flow", "calibrated5"),
        "calibrated5 (2)": ("alf-flow", "calibrated5"), "ddim": ("ddim", "ddim"),
    }  # fmt: skip
    # What the default encoder's second state knows is not for another decoder.
    row = rows["calibrated5", 5]
    assert (row["states"], row["growth"], row["encode_calls"], row["decode_calls"]) == (1, None, 5, 5)
    back = ddim_ode.sample(FIELD, ddim_ode.encode(FIELD, IMAGES, nfe=5, data_range=None).x, solver=down).x
    assert row["round_trip_mse"] == row["alone_mse"] == pytest.approx(float(mse(IMAGES, back).mean()))
    row, latent = rows["calibrated-encode5", 5], ddim_ode.encode(FIELD, IMAGES, solver=up, data_range=None).x
    assert row["latent_rms"] == pytest.approx(float(rms(latent, LATENT).square().mean().sqrt()))
    back = ddim_ode.sample(FIELD, latent, nfe=5).x
    assert row["round_trip_mse"] == pytest.approx(float(mse(IMAGES, back).mean()))
    assert [row["solver"] for row in found.record["along"]["rows"]] == [*ways]


def test_a_solver_of_another_model_is_refused_before_any_call():
    down = ddim_ode.calibrate(FIELD, 3, n=4, refine=0, reference_nfe=160)
    other = EpsilonField(lambda x, t: x, LINEAR, shape=EXACT.shape)
    with pytest.raises(ValueError, match="calibrated for another model"):
        reconstruct(other, IMAGES, [down], [3], data_range=None)
    assert other.nfe == 0
