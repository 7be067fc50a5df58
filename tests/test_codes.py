"""Codes: encoded images with all that decoding needs, and files of them."""

from __future__ import annotations

import json
import math
import pickle
import random
import stat
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import ddim_ode
from ddim_ode import (
    DATA,
    Adaptive,
    AsynchronousLeapfrog,
    Clock,
    Code,
    EpsilonField,
    Flow,
    Gaussian,
    Generative,
    ImplicitMidpoint,
    Inverse,
    McCallumFoster,
    Multistep,
    NoiseSchedule,
    RungeKutta,
    Scipy,
    SingleStep,
    Status,
    Tableau,
    TorchDiffEq,
    TwoStep,
    decode,
    encode,
    load_code,
    sample,
    solvers,
)
from ddim_ode.cli import main
from ddim_ode.codes import FORMAT, is_code
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.sampling import LatentWarning
from ddim_ode.solvers import arctan, flow, get
from ddim_ode.solvers.base import asinh
from ddim_ode.solvers.configs import from_config, to_config
from ddim_ode.solvers.runge_kutta import DOPRI5, HEUN

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 2, 3)
FIELD = EpsilonField.from_sigma(
    GaussianEpsilon(torch.full(SHAPE, 0.1), torch.linspace(0.1, 0.4, 6).reshape(SHAPE)), LINEAR, shape=SHAPE
)
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0 - 1.0
ENDINGS = (".safetensors", ".npz")


class Net(torch.nn.Module):
    """A network of one convolution that knows its time and perhaps a class."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, condition=None):
        out = torch.tanh(self.layer(x)) + 1e-4 * t.reshape(-1, 1, 1, 1)
        return out if condition is None else out + 0.1 * condition.reshape(-1, 1, 1, 1)


def network(seed=0, schedule=LINEAR, **options):
    return EpsilonField(Net(seed), schedule, **({"shape": SHAPE} | options))


def bits(a, b):
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


@pytest.fixture(autouse=True)
def _coarse_latents():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentWarning)
        yield


@pytest.fixture
def code():
    return Code.of(FIELD, encode(FIELD, IMAGES, steps=4))


def altered(path, about=None, arrays=None):
    """A code's file written anew, with changes to what it says of itself, or to its arrays."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            own = {name: file[name] for name in file.files}
        said = json.loads(str(own.pop("ddim_ode")))
        own = (arrays or (lambda x: x))({name: torch.from_numpy(x) for name, x in own.items()})
        said = (about or (lambda x: x))(said)
        np.savez(path, ddim_ode=np.array(json.dumps(said)), **{name: x.numpy() for name, x in own.items()})
    else:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["ddim_ode"])
        own = (arrays or (lambda x: x))(load_file(path))
        save_file(own, path, {"ddim_ode": json.dumps((about or (lambda x: x))(said))})


# -- there and back -------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", ["alf-flow", "o-belm", "ddim", "mf-heun", "inverse-ddim"])
def test_files_hold_every_bit(tmp_path, ending, dtype, solver):
    made = Code.of(FIELD, encode(FIELD, IMAGES, steps=4, solver=solver, dtype=dtype))
    path = tmp_path / f"code{ending}"
    made.save(path)
    read = load_code(path)
    bits(read.latent, made.latent)
    assert read.latent.dtype == dtype
    assert (read.second is None) == (made.second is None) == (not get(solver).paired)
    if made.second is not None:
        bits(read.second, made.second)
    np.testing.assert_array_equal(read.grid.sigmas, made.grid.sigmas)
    assert read.grid == made.grid
    assert read.grid.name == made.grid.name
    assert read.solver == made.solver
    assert read.model == made.model
    assert read.status == made.status
    assert read.version == ddim_ode.__version__
    bits(decode(FIELD, read).x, decode(FIELD, made).x)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert is_code(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_decoded_file_is_the_images(tmp_path, ending):
    field = network().model.double()
    field = EpsilonField(field, LINEAR, shape=SHAPE)
    for solver in ("alf-flow", "o-belm", "bdia", "mf-midpoint"):
        run = encode(field, IMAGES, steps=8, solver=solver, batch_size=2)
        Code.of(field, run).save(tmp_path / f"c{ending}")
        back = decode(field, load_code(tmp_path / f"c{ending}"), batch_size=2)
        torch.testing.assert_close(back.x, IMAGES, rtol=0.0, atol=1e-10)
        assert float((decode(field, run.x, solver=solver, grid=run.grid).x - IMAGES).abs().max()) > 1e-4


def test_half_precision(tmp_path):
    made = Code.of(FIELD, encode(FIELD, IMAGES, steps=4, dtype=torch.bfloat16))
    made.save(tmp_path / "c.safetensors")
    bits(load_code(tmp_path / "c.safetensors").latent, made.latent)
    with pytest.raises(ValueError, match=r"an \.npz file does not hold bfloat16"):
        made.save(tmp_path / "c.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_statuses_survive(tmp_path):
    def spoiled(x, sigma):
        return torch.where((x > 0.999).flatten(1).any(1).reshape(-1, 1, 1, 1), torch.nan, torch.tanh(x))

    images = IMAGES.clone().clamp(-0.9, 0.9)
    images[1] = 1.0
    field = EpsilonField.from_sigma(spoiled, LINEAR, shape=SHAPE)
    fine = EpsilonField.from_sigma(lambda x, sigma: torch.tanh(x), LINEAR, shape=SHAPE)
    run = encode(field, images, grid=np.linspace(0.0, 0.05, 5), solver="alf-flow")
    assert run.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    made = Code.of(field, run)
    for ending in ENDINGS:
        made.save(tmp_path / f"c{ending}")
        read = load_code(tmp_path / f"c{ending}")
        assert read.status == run.status
        back = decode(fine, read)
        assert back.status == run.status
        torch.testing.assert_close(back.x[[0, 2]], images[[0, 2]], rtol=0.0, atol=1e-12)
    stopped = encode(FIELD, IMAGES, steps=4, solver="ddim", callback=lambda step: True)
    with pytest.raises(ValueError, match="a callback stopped this one"):
        Code.of(FIELD, stopped)
    loose = encode(FIELD, IMAGES, steps=4, solver=ImplicitMidpoint(max_iterations=2))
    assert decode(FIELD, Code.of(FIELD, loose)).status == (Status.UNCONVERGED,) * 3


def test_others_may_read_it(code, tmp_path):
    """Files come with the permissions of any file, not for the owner alone."""
    (tmp_path / "plain").touch()
    for ending in ENDINGS:
        code.save(tmp_path / f"c{ending}")
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", f"c{ending}")}
        assert len(modes) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_of_a_file_that_cannot_be_written(code, tmp_path, ending):
    with pytest.raises(OSError, match="No such file"):
        code.save(tmp_path / "missing" / f"c{ending}")
    code.save(tmp_path / f"c{ending}")
    before = (tmp_path / f"c{ending}").read_bytes()
    broken = replace(code, latent=code.latent, solver=_Own())
    with pytest.raises(ValueError, match="a _Own cannot be written as plain data"):
        broken.save(tmp_path / f"c{ending}")
    assert (tmp_path / f"c{ending}").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [f"c{ending}"]
    with pytest.raises(ValueError, match=r"codes are written as \.safetensors or \.npz"):
        code.save(tmp_path / "c.pt")


# -- files that are not whole ------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_cut_short_is_refused(code, tmp_path, ending):
    path, cut = tmp_path / f"c{ending}", tmp_path / f"cut{ending}"
    code.save(path)
    whole = path.read_bytes()
    lengths = {*range(0, len(whole), 37), *range(64), *range(len(whole) - 64, len(whole))}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            load_code(cut)
        is_code(cut)
    cut.write_bytes(whole + b"x")
    if ending == ".safetensors":
        with pytest.raises(ValueError, match="cut"):
            load_code(cut)


@pytest.mark.parametrize("ending", ENDINGS)
def test_flipped_bits_are_refused_or_do_not_matter(code, tmp_path, ending):
    """Wherever they are: in what it says of itself, in the arrays, between them."""
    path = tmp_path / f"c{ending}"
    code.save(path)
    whole = path.read_bytes()
    draw, refused = random.Random(0), 0
    for at in draw.sample(range(len(whole)), 500):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read = load_code(path)
        except ValueError:
            refused += 1
            continue
        bits(read.latent, code.latent)
        bits(read.second, code.second)
        assert (read.solver, read.grid, read.model, read.status) == (code.solver, code.grid, code.model, code.status)
    assert refused > 300


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_without_its_second_state_is_refused(code, tmp_path, ending):
    path = tmp_path / f"c{ending}"
    code.save(path)
    altered(path, arrays=lambda x: {name: v for name, v in x.items() if name != "second"})
    with pytest.raises(ValueError, match="lacks the second state that alf-flow keeps"):
        load_code(path)
    code.save(path)
    altered(path, arrays=lambda x: {name: v for name, v in x.items() if name not in ("latent", "sigmas")})
    with pytest.raises(ValueError, match="a code without its latent and sigmas"):
        load_code(path)
    with pytest.raises(ValueError, match="a code of alf-flow needs its second state"):
        replace(code, second=None)


@pytest.mark.parametrize("ending", ENDINGS)
def test_altered_arrays_are_refused(code, tmp_path, ending):
    path = tmp_path / f"c{ending}"
    for change, said in (
        (lambda x: x | {"latent": x["latent"] + 1e-15}, "is damaged"),
        (lambda x: x | {"second": x["second"][:2]}, "holds latents of shape .* with second states of"),
        (lambda x: x | {"latent": x["latent"][:2], "second": x["second"][:2]}, "2 latents but the status of 3 images"),
        (lambda x: x | {"sigmas": x["sigmas"].flip(0)}, "is damaged"),
        (lambda x: x | {"sigmas": x["sigmas"] * torch.nan}, "does not say how to decode it: a grid's sigmas"),
        (lambda x: x | {"latent": torch.tensor(1.0)}, "holds no latents"),
        (lambda x: x | {"latent": x["latent"].long()}, "holds no latents"),
    ):
        code.save(path)
        altered(path, arrays=change)
        with pytest.raises(ValueError, match=said):
            load_code(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_it_says_of_itself_is_checked(code, tmp_path, ending):
    path = tmp_path / f"c{ending}"
    for change, said in (
        (lambda x: x | {"format": FORMAT + 1, "version": "9.9"}, r"written by ddim_ode 9\.9 in layout 2, .*: upgrade"),
        (lambda x: x | {"format": "new"}, "what it says of itself cannot be read"),
        (lambda x: {k: v for k, v in x.items() if k != "format"}, "what it says of itself cannot be read"),
        (lambda x: [x], "what it says of itself cannot be read"),
        (lambda x: x | {"solver": {"kind": "Later", "k": 1}}, "'Later' is no solver of this version"),
        (lambda x: x | {"solver": {"kind": "TwoStep", "knob": 1}}, "has not these options"),
        (lambda x: x | {"solver": {"kind": "TwoStep", "gamma": 7.0, "clock": "sigma"}}, "gamma of BDIA"),
        (lambda x: x | {"solver": "alf"}, "its solver is 'alf'"),
        (lambda x: x | {"solver": None}, "its solver is None"),
        (lambda x: x | {"schedule": {}}, "does not say how to decode it"),
        (lambda x: x | {"status": ["FINE"] * 3}, "does not say how to decode it"),
        (lambda x: x | {"model": 3}, "does not say how to decode it"),
        (lambda x: {k: v for k, v in x.items() if k != "model"}, "does not say how to decode it"),
        (lambda x: x | {"grid": "linear"}, "is damaged"),
        (lambda x: {k: v for k, v in x.items() if k != "sha256"}, "is damaged"),
    ):
        code.save(path)
        altered(path, about=change)
        with pytest.raises(ValueError, match=said):
            load_code(path)


class _Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_objects_are_never_run(code, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "c.npz"
    bomb = np.array([_Bomb(trace)], dtype=object)
    code.save(path)
    with np.load(path) as file:
        own = {name: file[name] for name in file.files}
    for name in ("latent", "second", "ddim_ode", "extra"):
        np.savez(path, **(own | {name: bomb}))
        with pytest.raises(ValueError, match="cannot be read as a code"):
            load_code(path)
        is_code(path)
        assert not trace.exists()
    for ending in ENDINGS:
        other = tmp_path / f"p{ending}"
        other.write_bytes(pickle.dumps(_Bomb(trace)))
        with pytest.raises(ValueError, match="cannot be read as a code"):
            load_code(other)
        is_code(other)
        assert not trace.exists()
    pickle.loads(pickle.dumps(_Bomb(trace))).close()
    assert trace.exists()  # the bomb is one


def test_what_is_no_code(code, tmp_path):
    with pytest.raises(FileNotFoundError, match="no code at"):
        load_code(tmp_path / "none.npz")
    np.savez(tmp_path / "latents.npz", latent=code.latent.numpy())
    np.save(tmp_path / "latents.npy", code.latent.numpy())
    save_file({"latent": code.latent}, tmp_path / "w.safetensors")
    (tmp_path / "text.npz").write_text("hello")
    for name, said in (
        ("latents.npz", "is not a code: it does not say how it was made"),
        ("latents.npy", "it is a single array"),
        ("w.safetensors", "is not a code: it does not say how it was made"),
        ("text.npz", "cannot be read as a code"),
    ):
        with pytest.raises(ValueError, match=said):
            load_code(tmp_path / name)
        assert is_code(tmp_path / name) == (name == "w.safetensors")  # no latents come as that
    with pytest.raises((OSError, ValueError)):
        load_code(tmp_path)


# -- the model, solver and grid that made it ---------------------------------------------------------
@pytest.mark.parametrize(
    ("made", "other", "said"),
    [
        ({}, {"seed": 1}, r"weights is '.{12}…', was '.{12}…'"),
        ({}, {"schedule": NoiseSchedule.cosine()}, "schedule is .*, was"),
        ({}, {"label": "nearest"}, "label is 'nearest', was 'fractional'"),
        ({}, {"prediction": "v_prediction"}, "prediction is 'v_prediction', was 'epsilon'"),
        ({}, {"coordinates": "exploding"}, "coordinates is 'exploding', was 'preserving'"),
        ({}, {"dtype": torch.float64, "model": Net(0).double()}, "dtype is 'float64', was 'float32'"),
        ({"condition": torch.tensor([1.0])}, {"condition": torch.tensor([2.0])}, "condition is"),
        ({"condition": torch.tensor([1.0])}, {}, "condition is None, was"),
        ({}, {"autocast": torch.bfloat16}, "autocast is 'bfloat16', was None"),
        ({}, {"clip": 0.5}, "clip is 0.5, was None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_another_model_is_refused(tmp_path, made, other, said):
    field = network(**made)
    options = dict(other)
    model = options.pop("model", None)
    stranger = network(**options) if model is None else EpsilonField(model, LINEAR, shape=SHAPE, dtype=options["dtype"])
    Code.of(field, encode(field, IMAGES, grid=np.linspace(0.0, 2.0, 5), solver="alf")).save(tmp_path / "c.safetensors")
    code = load_code(tmp_path / "c.safetensors")
    assert not code.differences(field)
    field.nfe = stranger.nfe = 0
    with pytest.raises(ValueError, match=f"this code was made otherwise: .*{said}.*force=True"):
        decode(stranger, code)
    assert stranger.nfe == 0
    forced = decode(stranger, code, force=True)
    assert forced.success
    assert stranger.nfe > 0
    right = decode(field, code)
    torch.testing.assert_close(right.x, IMAGES, rtol=0.0, atol=1e-5)
    assert float((forced.x - right.x).abs().max()) > 1e-9


def test_models_that_are_no_modules_cannot_be_told_apart():
    code = Code.of(FIELD, encode(FIELD, IMAGES, grid=np.linspace(0.0, 2.0, 5), solver="alf"))
    stranger = EpsilonField.from_sigma(lambda x, s: torch.tanh(x), LINEAR, shape=SHAPE)
    assert code.differences(stranger) == []
    assert code.differences(EpsilonField.from_sigma(lambda x, s: x, LINEAR)) == []  # one that says no shape
    other = EpsilonField.from_sigma(lambda x, s: x, LINEAR, shape=(7,))
    assert code.differences(other) == ["shape is [7], was [1, 2, 3]"]


def test_a_wrapped_model_is_the_model():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False).eval()
    plain = EpsilonField(net, LINEAR, shape=(2,)).describe()
    assert EpsilonField(torch.nn.DataParallel(net), LINEAR, shape=(2,)).describe() == plain
    assert EpsilonField(net[0], LINEAR, shape=(2,)).describe()["weights"] != plain["weights"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "ddim"}, "solver is ddim, was alf-flow"),
        ({"grid": "quadratic", "steps": 4}, "the grid is <Grid quadratic.*, was <Grid flow-up"),
        ({"steps": 5}, "the grid is <Grid flow-up: 5 steps.*, was <Grid flow-up: 4 steps"),
        ({"nfe": 20}, "the grid is <Grid flow-up: 19 steps.*, was <Grid flow-up: 4 steps"),
        ({"grid": [0.0, 1.0, 2.0]}, "the grid is <Grid explicit: 2 steps"),
        ({"solver": "heun", "nfe": 8, "grid": "karras"}, "solver is heun, was alf-flow; the grid is <Grid karras: 4"),
    ],
    ids=str,
)
def test_another_solver_or_grid_is_refused(code, options, said):
    FIELD.nfe = 0
    with pytest.raises(ValueError, match=f"this code was made otherwise: {said}"):
        decode(FIELD, code, **options)
    assert FIELD.nfe == 0
    forced = decode(FIELD, code, force=True, **options)
    named = options.get("solver", "alf-flow")
    assert forced.solver == named
    # What is not named stays the code's own, and a second state of another pair of solver and grid is not used.
    grid = {"grid": code.grid} if options.keys() == {"solver"} else {"grid": "flow-up"} | options
    bits(forced.x, sample(FIELD, code.latent, **(grid | {"solver": named})).x)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"eta": 1.0}, "ddpm"), ({"sigma_hat": True}, "ddpm-sigma-hat"), ({"eta": 0.0}, "ddim-eta0"), ({"eta": 0.3}, "ddim-eta0.3")],
)  # fmt: skip
def test_noise_is_another_solver(code, options, named):
    with pytest.raises(ValueError, match=rf"solver is {named}, was {code.solver.name}\. force=True decodes"):
        decode(FIELD, code, **options)
    down = code.grid.reversed()
    forced = decode(FIELD, code, force=True, seed=3, **options)
    assert (forced.solver, forced.grid) == (named, down)
    bits(forced.x, sample(FIELD, code.latent, grid=down, seed=3, **options).x)
    # Nodes of its own it has too.
    forced = decode(FIELD, code, force=True, steps=7, grid="linear", **options)
    bits(forced.x, sample(FIELD, code.latent, grid="linear", steps=7, **options).x)
    with pytest.raises(ValueError, match="leave solver out"):
        decode(FIELD, code, force=True, solver="ddim", **options)
    same = decode(FIELD, code, eta=None, sigma_hat=False)
    bits(same.x, decode(FIELD, code).x)


def test_the_same_solver_and_grid_may_be_said_again(code):
    plain = decode(FIELD, code).x
    for options in (
        {"solver": "alf-flow"},
        {"grid": code.grid},
        {"grid": code.grid.sigmas.tolist()},
        {"steps": 4},
        {"nfe": 5},
        {"grid": "flow-up", "steps": 4, "solver": "alf-flow"},
        {"steps": None, "solver": None},
    ):
        bits(decode(FIELD, code, **options).x, plain)
    torch.testing.assert_close(plain, IMAGES, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(decode(FIELD, code, dtype=torch.float32).x, IMAGES.float(), rtol=0.0, atol=1e-5)
    with pytest.raises(ValueError, match="force is for codes"):
        decode(FIELD, code.latent, force=True)


def test_codes_are_made_of_encodings():
    run = encode(FIELD, IMAGES, steps=4, solver=TwoStep(clock=arctan(0.3)))
    code = Code.of(FIELD, run)
    assert code.solver == TwoStep(clock=arctan(0.3))
    torch.testing.assert_close(decode(FIELD, code).x, IMAGES, rtol=0.0, atol=1e-10)
    with pytest.raises(ValueError, match="a code is made of an encoding run, but this one goes down"):
        Code.of(FIELD, sample(FIELD, n=2, steps=4))


def test_solvers_of_one_name_are_told_apart(tmp_path):
    """A code keeps the solver that made it, whatever else has its name."""
    other = AsynchronousLeapfrog("sigma", Flow(0.15))
    assert other.name == "alf-flow"
    loose = replace(get("dopri5"), rtol=1e-2, atol=1e-2)
    for solver, options in ((other, {"steps": 4}), (loose, {}), (ImplicitMidpoint(tol=1e-3), {"steps": 4})):
        run = encode(FIELD, IMAGES, solver=solver, batch_size=2, **options)
        Code.of(FIELD, run).save(tmp_path / "c.npz")
        code = load_code(tmp_path / "c.npz")
        assert code.solver == solver
        with pytest.raises(ValueError, match=f"solver is {solver.name}, was {solver.name} of other options"):
            decode(FIELD, code, solver=get(solver.name))
    code = Code.of(FIELD, encode(FIELD, IMAGES, steps=4, solver=other))
    torch.testing.assert_close(decode(FIELD, code).x, IMAGES, rtol=0.0, atol=1e-10)


# -- solvers as plain data ------------------------------------------------------------------------
class _Own(Multistep):
    """A solver that is not of the package."""

    def __init__(self) -> None:
        super().__init__(1)


RALSTON = Tableau("ralston", 2, ((), (2 / 3,)), (1 / 4, 3 / 4), "Ralston 1962")
MADE_UP = [
    TwoStep(gamma=0.96, clock=asinh(0.2)),
    TwoStep(clock="t"),
    AsynchronousLeapfrog(flow(0.4), Flow(0.4)),
    AsynchronousLeapfrog("log", label="mine", source="me"),
    McCallumFoster(RungeKutta(HEUN, arctan(2.0), euler_at_zero=True), 0.9),
    McCallumFoster(SingleStep("half", 2, (0.0, 0.5), ((0,), (0, 1)))),
    Inverse(RungeKutta(RALSTON), tol=1e-3),
    ImplicitMidpoint(tol=1e-4, max_iterations=7, memory=2, clock="arctan"),
    Multistep(3, clock=arctan(0.1), linear=Flow(0.02), corrector="free", start="rk"),
    Multistep(2, linear=DATA, clock="log"),
    Adaptive(DOPRI5, rtol=1e-3, clock=asinh(0.1)),
    Scipy("LSODA", rtol=1e-4),
    TorchDiffEq("dopri8"),
    get("ab3-rk"),
    get("mf-dpm2s"),
    get("inverse-heun-edm"),
    Generative(0.0),
    Generative(deviations=(0.5, 0.0)),
]  # fmt: skip


@pytest.mark.parametrize("solver", [*solvers(), *MADE_UP], ids=lambda s: s.name)
def test_solvers_are_plain_data(solver):
    text = json.dumps(to_config(solver), allow_nan=False)
    assert '"_' not in text  # what a run knows is none of it
    read = from_config(json.loads(text))
    assert read == solver
    assert type(read) is type(solver)
    assert read.name == solver.name
    assert json.dumps(to_config(read)) == text


@pytest.mark.parametrize("solver", [s for s in MADE_UP if s.paired], ids=lambda s: s.name)
def test_files_of_made_up_solvers(tmp_path, solver):
    code = Code.of(FIELD, encode(FIELD, IMAGES, steps=5, solver=solver))
    code.save(tmp_path / "c.npz")
    read = load_code(tmp_path / "c.npz")
    assert read.solver == solver
    torch.testing.assert_close(decode(FIELD, read).x, IMAGES, rtol=0.0, atol=1e-8)


def _mine(c: float) -> Clock:
    return replace(arctan(c), name="mine", origin=(_mine, c))


def test_what_is_no_plain_data(tmp_path):
    gaussian = Multistep(2, linear=Gaussian(torch.zeros(SHAPE), torch.tensor(0.3)), label="g2")
    with pytest.raises(ValueError, match="a Gaussian cannot be written as plain data, for it holds tensors"):
        to_config(gaussian)
    code = Code.of(FIELD, encode(FIELD, IMAGES, steps=4, solver=gaussian))
    for ending in ENDINGS:
        with pytest.raises(ValueError, match="a Gaussian cannot be written as plain data"):
            code.save(tmp_path / f"c{ending}")
    assert not list(tmp_path.iterdir())
    assert decode(FIELD, code).success  # in memory it serves
    own = Clock("own", lambda s: 2.0 * s, lambda u: 0.5 * u, lambda s: 0.5 * np.ones_like(s))
    _mine.__name__ = "arctan"  # a clock's maker is told by what it is, not by what it is called
    for solver, kind in ((_Own(), "_Own"), (TwoStep(clock=own), "Clock"), (TwoStep(clock=_mine(2.0)), "Clock")):
        with pytest.raises(ValueError, match=f"a {kind} cannot be written as plain data"):
            to_config(solver)


def test_bad_configs():
    for config, said in (
        ({"kind": "Code"}, "'Code' is no solver of this version"),
        ({}, "None is no solver of this version"),
        ({"kind": ["TwoStep"]}, "is no solver of this version"),
        ({"kind": "TwoStep", "gama": 1.0}, "has not these options"),
        ({"kind": "RungeKutta"}, "has not these options"),
        ({"kind": "clock", "name": "tan", "c": 1.0}, "is no solver of this version"),
        ({"kind": "clock", "name": "flow", "c": -1.0}, "c of the clock flow must be a positive noise level"),
        ({"kind": "TwoStep", "gamma": math.pi, "clock": "sigma"}, "gamma of BDIA"),
        ({"kind": "McCallumFoster", "base": "ddim"}, "base must be a solver of fixed steps"),
    ):
        with pytest.raises(ValueError, match=said):
            from_config(config)


def test_a_newer_npz_is_no_bare_latent(tmp_path, capsys):
    """A file that calls itself a code is one, whatever is wrong with it."""
    field = ddim_ode.load("fashion-mnist")
    images = ddim_ode.data.as_tensor(ddim_ode.data.bundled_images()[:1])
    ddim_ode.Code.of(field, ddim_ode.encode(field, images, nfe=4)).save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        parts = dict(file)
    about = json.loads(str(parts["ddim_ode"])) | {"format": 99}
    np.savez(tmp_path / "c.npz", **(parts | {"ddim_ode": np.array(json.dumps(about))}))
    for command in (["decode"], ["sample"], ["latents"]):
        out = ["--out", str(tmp_path / ("o.png" if command != ["latents"] else "o"))]
        assert main([*command, "--latent", str(tmp_path / "c.npz"), *out]) == 2
        assert "upgrade" in capsys.readouterr().err


def test_a_schedule_of_few_times_decodes_its_codes():
    schedule = NoiseSchedule.linear(T=10)
    field = EpsilonField.from_sigma(lambda x, s: x * (s / (1.0 + s * s)), schedule, shape=(2,))
    data = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    code = ddim_ode.Code.of(field, ddim_ode.encode(field, data, steps=5))
    assert float((ddim_ode.decode(field, code).x - data).abs().max()) < 1e-12


def test_a_code_of_what_only_encodes_has_its_latent_decoded_by_another(tmp_path):
    options = {"n": 4, "refine": 0, "reference_nfe": 160}
    up, down = (ddim_ode.calibrate(FIELD, 4, direction=way, **options) for way in ("encode", "sample"))
    run = encode(FIELD, IMAGES, solver=up)
    Code.of(FIELD, run).save(tmp_path / "z.safetensors")
    code = load_code(tmp_path / "z.safetensors")
    assert code.solver == up
    calls = FIELD.nfe
    for more in ({}, {"solver": "ddim"}, {"solver": down}, {"nfe": 5}):
        with pytest.raises(
            ValueError, match=r"calibrated-encode4, which only encodes: .* decode\(field, code.latent, solver"
        ):
            decode(FIELD, code, **more)
    with pytest.raises(ValueError, match="was made to encode"):
        decode(FIELD, code, solver=up, force=True)
    with pytest.raises(ValueError, match=r"only encodes: .* was also made otherwise: .*label is"):
        decode(network(label="nearest"), code)
    other = EpsilonField.from_sigma(FIELD.model, LINEAR, shape=SHAPE, clip=1.0)
    with pytest.raises(ValueError, match="calibrated for another model"):
        decode(other, code, solver=down, force=True)
    assert (FIELD.nfe, other.nfe) == (calls, 0)
    for more in ({"nfe": 5}, {"solver": "ddim", "nfe": 5}, {"solver": down}):
        bits(decode(FIELD, code, force=True, **more).x, sample(FIELD, run.x, **more).x)


def test_a_calibrated_decoder_takes_any_code_by_force_on_its_own_grid(code):
    down = ddim_ode.calibrate(FIELD, 4, n=4, refine=0, reference_nfe=160)
    with pytest.raises(ValueError, match=r"solver is calibrated4, was alf-flow; the grid is <Grid calibrated: 5 steps"):
        decode(FIELD, code, solver=down)
    bits(decode(FIELD, code, solver=down, force=True).x, sample(FIELD, code.latent, solver=down).x)
    with pytest.raises(ValueError, match="nfe = 5 contradicts calibrated4"):
        decode(FIELD, code, solver=down, nfe=5, force=True)
