"""The one owner of scaling, labels, number formats, prediction types and guidance."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import ddim_ode
from ddim_ode import EpsilonField, NoiseSchedule
from ddim_ode.field import PREDICTIONS
from ddim_ode.models.analytic import GaussianEpsilon

LINEAR = NoiseSchedule.linear()
X = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def true_eps(x_bar, sigma):
    """Exact ε of N(0.3, 0.5²) in every dimension."""
    return sigma * (x_bar - 0.3) / (0.25 + sigma**2)


def seen(**options):
    calls = []

    def model(x, t, *rest):
        calls.append((x, t, *rest))
        return torch.zeros_like(x)

    return EpsilonField(model, LINEAR, **options), calls


def test_the_network_sees_scaled_states_and_fractional_labels():
    field, calls = seen()
    sigma = LINEAR.sigma(321.5)
    field(X, sigma)
    x, t = calls[0]
    torch.testing.assert_close(x, X / np.sqrt(1 + sigma**2), rtol=1e-14, atol=0)
    assert t.shape == (3,)
    torch.testing.assert_close(t, torch.full((3,), 320.5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert field.nfe == 1


def test_sigma_zero_gets_the_first_label():
    field, calls = seen()
    field(X, 0.0)
    assert calls[0][1].tolist() == [0.0] * 3
    torch.testing.assert_close(calls[0][0], X, rtol=0, atol=0)


def test_nearest_labels_are_integers():
    field, calls = seen(label="nearest")
    field(X, LINEAR.sigma(321.6))
    assert calls[0][1].dtype == torch.int64
    assert calls[0][1].tolist() == [321] * 3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.0, 1e-3 * LINEAR.sigma_min, LINEAR.sigma_min, 0.5, 20.0])
def test_every_prediction_type_gives_the_same_epsilon(prediction, sigma):
    level = max(sigma, LINEAR.sigma_min)  # what a network is asked for below its first level

    def model(x, t):
        # From the definitions, in the paper's α: x = √α x₀ + √(1−α) ε
        alpha = 1.0 / (1.0 + level**2)
        x_bar = x * np.sqrt(1.0 + sigma**2)
        eps = true_eps(x_bar, level)
        x0 = x_bar - level * eps
        return {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": np.sqrt(alpha) * eps - np.sqrt(1 - alpha) * x0,
            "score": -eps / np.sqrt(1 - alpha),
            "flow": eps - x0,
        }[prediction]

    field = EpsilonField(model, LINEAR, prediction)
    torch.testing.assert_close(field(X, sigma), true_eps(X, level), rtol=1e-10, atol=1e-10)


def test_parameters_set_the_networks_dtype_and_the_state_keeps_its_own():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.seen = None

        def forward(self, x, t):
            self.seen = x.dtype, t.dtype
            return x * self.scale

    network = Network()
    assert EpsilonField(network, LINEAR)(X, 1.0).dtype == torch.float64
    assert network.seen == (torch.float32, torch.float32)
    network.half()
    EpsilonField(network, LINEAR)(X, 1.0)
    assert network.seen == (torch.float16, torch.float32)
    EpsilonField(network.double(), LINEAR)(X.float(), 1.0)
    assert network.seen == (torch.float64, torch.float64)
    field, calls = seen(dtype=torch.float32)
    field(X, 1.0)
    assert calls[0][0].dtype == torch.float32


def test_half_precision_networks_never_see_the_unscaled_state():
    cosine = NoiseSchedule.cosine()
    field = EpsilonField(lambda x, t: x, cosine, dtype=torch.float16)
    assert bool(field(X * cosine.sigma_max * 10.0, cosine.sigma_max).isfinite().all())


def test_from_sigma_sees_the_state_itself():
    calls = []

    def eps(x_bar, sigma):
        calls.append((x_bar, sigma))
        return true_eps(x_bar, sigma)

    field = EpsilonField.from_sigma(eps, LINEAR)
    torch.testing.assert_close(field(X, 2.0), true_eps(X, 2.0))
    assert calls[0][0] is X
    assert calls[0][1] == 2.0
    assert field.nfe == 1


def test_guidance_is_one_doubled_batch():
    calls = []

    def model(x, t, condition):
        calls.append(x.shape[0])
        return x * condition[:, None, None]

    given, null = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    field = EpsilonField(model, LINEAR, condition=given, null_condition=null, guidance_scale=2.5)
    x = X / np.sqrt(2.0)
    torch.testing.assert_close(field(X, 1.0), 2.5 * x * given[:, None, None])
    assert calls == [6]
    assert field.nfe == 1
    plain = EpsilonField(model, LINEAR, condition=given)
    torch.testing.assert_close(plain(X, 1.0), x * given[:, None, None])
    assert calls == [6, 3]


def test_autocast_channels_last_and_compile():
    network = nn.Conv2d(2, 2, 3, padding=1)
    images = torch.randn(2, 2, 8, 8)
    formats = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            out = self.inner(x)
            formats.append((out.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return out

    plain = EpsilonField(Network(), LINEAR)(images, 1.0)
    cast = EpsilonField(Network(), LINEAR, autocast=torch.bfloat16, channels_last=True)(images, 1.0)
    assert formats == [(torch.float32, False), (torch.bfloat16, True)]
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.05, atol=0.05)


def test_a_model_may_move_and_change_dtype_after_it_was_wrapped():
    network = nn.Linear(4, 4)
    model = type("Network", (nn.Module,), {"forward": lambda self, x, t: self.inner(x)})()
    model.inner = network
    field = EpsilonField(model, LINEAR)
    assert (field.dtype, field.device) == (torch.float32, torch.device("cpu"))
    model.double()
    assert field.dtype == torch.float64
    torch.testing.assert_close(field(X, 1.0), network(X / np.sqrt(2.0)), rtol=1e-14, atol=1e-14)
    model.to("meta")
    assert field.device == torch.device("meta")
    assert EpsilonField(model, LINEAR, dtype=torch.float16).dtype == torch.float16


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_networks_give_the_same():
    network = nn.Conv2d(2, 2, 3, padding=1)
    images = torch.randn(2, 2, 8, 8)
    model = type("Network", (nn.Module,), {"forward": lambda self, x, t: network(x)})()
    compiled = EpsilonField(model, LINEAR, compile=True)(images, 1.0)
    torch.testing.assert_close(compiled, EpsilonField(model, LINEAR)(images, 1.0))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: EpsilonField("net", LINEAR), TypeError, "callable"),
        (lambda: EpsilonField(torch.sin, LINEAR, "eps"), ValueError, "did you mean 'epsilon'"),
        (lambda: EpsilonField(torch.sin, LINEAR, label="round"), ValueError, "fractional"),
        (lambda: EpsilonField(torch.sin, LINEAR, guidance_scale=2.0), ValueError, "null_condition"),
        (lambda: EpsilonField.from_sigma(3.0, LINEAR), TypeError, "callable"),
        (lambda: EpsilonField(torch.sin, "linear"), TypeError, "schedule must be a NoiseSchedule"),
        (lambda: EpsilonField(torch.sin, NoiseSchedule.edm(), label="nearest"), ValueError, "whole numbers"),
        (lambda: EpsilonField(torch.sin, LINEAR, condition=3), TypeError, "condition must be a tensor"),
        (lambda: EpsilonField(torch.sin, LINEAR, condition=torch.tensor(3)), TypeError, "one row a sample"),
        (
            lambda: EpsilonField(
                torch.sin, LINEAR, condition=torch.ones(1, 2), null_condition=torch.ones(1, 3), guidance_scale=2.0
            ),
            ValueError,
            "rows of one shape",
        ),
        (lambda: EpsilonField(torch.sin, LINEAR, guidance_scale=np.nan), ValueError, "finite"),
        (lambda: EpsilonField(torch.sin, LINEAR, autocast=True), TypeError, "autocast must be a floating dtype"),
        (lambda: EpsilonField(torch.sin, LINEAR, dtype=torch.int32), TypeError, "dtype must be a floating dtype"),
        (lambda: EpsilonField(torch.sin, LINEAR, shape=4), TypeError, r"such as \(4,\)"),
        *(
            (lambda make=make, clip=clip: make(clip=clip), ValueError, "clip must be a positive number")
            for make in (
                lambda **b: EpsilonField(torch.sin, LINEAR, **b),
                lambda **b: EpsilonField.from_sigma(torch.mul, LINEAR, **b),
                lambda **b: ddim_ode.load("fashion-mnist", **b),
            )
            for clip in (0.0, -1.0, np.nan, np.inf, True, "1", (-1.0, 1.0))
        ),
        *(
            (lambda q=q: EpsilonField(torch.sin, LINEAR, threshold=q), ValueError, r"quantile in \(0, 1\]")
            for q in (0.0, -0.1, 1.01, 99.5, np.nan, True, "0.9")
        ),
        (
            lambda: EpsilonField(lambda x, t: x[:, :1], LINEAR)(X, 1.0),
            ValueError,
            r"shape \(3, 2, 4\), but returned \(3, 1, 4\)",
        ),
        (lambda: EpsilonField(lambda x, t: (x,), LINEAR)(X, 1.0), ValueError, "but returned tuple"),
        (lambda: EpsilonField.from_sigma(lambda x, s: None, LINEAR)(X, 1.0), ValueError, "but returned NoneType"),
        (
            lambda: EpsilonField(lambda x, t, c: x, LINEAR, condition=torch.ones(2))(X, 1.0),
            ValueError,
            "condition has 2 rows, but the batch has 3",
        ),
    ],
)
def test_bad_use_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


# -- clipping and thresholding -------------------------------------------------------------------
def by_hand(x_bar, sigma, most, quantile=None):
    """ε of the predicted data kept within bounds, in numpy, sample by sample: Imagen's few lines."""
    eps = true_eps(x_bar, sigma).numpy()
    out = np.empty_like(eps)
    for i, (x, e) in enumerate(zip(x_bar.numpy(), eps, strict=True)):
        x0 = x - sigma * e
        s = most if quantile is None else max(np.quantile(np.abs(x0), quantile), most)
        out[i] = (x - np.clip(x0, -s, s) * (most / s)) / sigma
    return torch.from_numpy(out)


#: Samples of three sizes: one within any bound, one half out of them, one far out.
SIZES = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64).reshape(3, 1, 1)


@pytest.mark.parametrize(
    ("bounds", "most", "quantile"),
    [
        ({"clip": 1.0}, 1.0, None),
        ({"clip": 0.25}, 0.25, None),
        ({"threshold": 0.9}, 1.0, 0.9),
        ({"threshold": 0.5, "clip": 0.5}, 0.5, 0.5),
        ({"threshold": 1.0}, 1.0, 1.0),
        ({"threshold": 1e-9, "clip": 2}, 2.0, 1e-9),
    ],
)
@pytest.mark.parametrize("sigma", [LINEAR.sigma_min, 0.6, 20.0])
@pytest.mark.parametrize("make", ["network", "from_sigma"])
def test_bounds_are_those_of_a_few_lines_by_hand(bounds, most, quantile, sigma, make):
    def model(x, t):
        s = LINEAR.sigma(float(t[0]) + 1.0)
        return true_eps(x * np.sqrt(1.0 + s * s), s)

    field = EpsilonField(model, LINEAR, **bounds) if make == "network" else None
    field = field or EpsilonField.from_sigma(true_eps, LINEAR, **bounds)
    x_bar = (1.0 + sigma) * SIZES * X
    found = field(x_bar, sigma)
    torch.testing.assert_close(found, by_hand(x_bar, sigma, most, quantile), rtol=1e-7, atol=1e-7)
    assert field.nfe == 1
    kept = x_bar - sigma * found
    assert float(kept.abs().max()) <= most * (1.0 + 1e-9)
    # A sample within the bounds is left to the bit, small σ or not.
    inside = [i for i in range(3) if float((x_bar[i] - sigma * true_eps(x_bar, sigma)[i]).abs().max()) <= most]
    plain = EpsilonField(model, LINEAR) if make == "network" else EpsilonField.from_sigma(true_eps, LINEAR)
    assert torch.equal(found[inside], plain(x_bar, sigma)[inside])


def test_a_wide_bound_changes_nothing():
    latent = ddim_ode.noise((2, 4), 3, 0)
    runs = [
        ddim_ode.sample(EpsilonField.from_sigma(true_eps, LINEAR, **bounds), latent, steps=6, dtype=dtype).x
        for dtype in (torch.float64, torch.float32)
        for bounds in ({}, {"clip": 100.0}, {"clip": 100.0, "threshold": 0.99})
    ]
    for run in (runs[1], runs[2]):
        assert torch.equal(run, runs[0])
    for run in (runs[4], runs[5]):
        assert torch.equal(run, runs[3])


def test_sigma_zero_is_left_alone():
    """x̂₀ is x̄ there, whatever ε is."""
    field = EpsilonField.from_sigma(lambda x, s: 5.0 * x, LINEAR, clip=0.1, threshold=0.9)
    assert torch.equal(field(X, 0.0), 5.0 * X)


@pytest.mark.parametrize("bounds", [{"clip": 0.8}, {"threshold": 0.8, "clip": 0.8}])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predicted_data_stay_within_bounds_at_every_step(prediction, bounds):
    field = EpsilonField(lambda x, t: 3.0 * torch.sin(5.0 * x), LINEAR, prediction, shape=(2, 4), **bounds)
    inner, seen = field.bind, []

    def bind(x_bar, *rest):
        evaluate = inner(x_bar, *rest)

        def watched(x, sigma):
            eps = evaluate(x, sigma)
            seen.append(float((x - sigma * eps).abs().max()))
            return eps

        return watched

    field.bind = bind
    run = ddim_ode.sample(field, n=4, seed=1, steps=8, solver="ddim", grid="quadratic")
    assert len(seen) == 8
    assert max(seen) <= 0.8 * (1.0 + 1e-6)
    assert max(seen) > 0.79  # it was needed
    # Euler's last step lands on the last prediction.
    assert float(run.x.abs().max()) <= 0.8 * (1.0 + 1e-6)


def test_bounds_work_in_half_precision():
    network = nn.Linear(4, 4).requires_grad_(False)
    model = type("Network", (nn.Module,), {"forward": lambda self, x, t: 4.0 * self.inner(x)})()
    model.inner = network
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype)
        for bounds in ({"clip": 1.0}, {"threshold": 0.9}):
            field = EpsilonField(model, LINEAR, **bounds)
            for state in (torch.float64, torch.float32, torch.bfloat16):
                found = field((2.0 * X).to(state), 2.0)
                assert found.dtype == state
                assert float(((2.0 * X).to(state) - 2.0 * found).abs().max()) <= 1.0 + 0.05


def test_a_failing_network_is_not_hidden_by_its_bounds():
    def model(x, t):
        return torch.where(x.flatten(1)[:, :1, None] > 10.0, torch.inf, x)

    start = X.clone()
    start[1] = 100.0
    for bounds in ({"clip": 1.0}, {"threshold": 0.9}):
        run = ddim_ode.integrate(EpsilonField(model, LINEAR, **bounds), start, [2.0, 1.0, 0.5])
        assert [bool(s) for s in run.status] == [False, True, False]


def test_bounds_hold_with_guidance_and_batches():
    """They apply to what guidance made, sample by sample."""
    given, null = torch.tensor([1.0, 2.0, 3.0]).double(), torch.zeros(1).double()
    field = EpsilonField(
        lambda x, t, c: x * c[:, None, None], LINEAR,
        condition=given, null_condition=null, guidance_scale=2.0, threshold=0.7,
    )  # fmt: skip
    whole = ddim_ode.sample(field, X, steps=5, solver="ab2")
    parts = ddim_ode.sample(field, X, steps=5, solver="ab2", batch_size=2)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-13, atol=1e-13)
    eps = field(X, 3.0)
    raw = EpsilonField(lambda x, t: 2.0 * x * given[:, None, None], LINEAR)(X, 3.0)
    x0 = X - 3.0 * raw
    s = torch.quantile(x0.flatten(1).abs(), 0.7, dim=1).clamp(min=1.0).reshape(3, 1, 1)
    torch.testing.assert_close(eps, (X - torch.clamp(x0, -s, s) / s) / 3.0)


def test_other_makes_and_loaded_models_take_bounds():
    edm = NoiseSchedule.edm()
    field = EpsilonField.from_denoiser(lambda x, s: 7.0 * torch.ones_like(x), edm, clip=0.5)
    torch.testing.assert_close(X - 2.0 * field(X, 2.0), torch.full_like(X, 0.5))
    assert EpsilonField.from_velocity(lambda x, t: x, threshold=0.9).threshold == 0.9
    assert EpsilonField.from_score(lambda x, t: x, LINEAR, clip=2.0).clip == 2.0
    loaded = ddim_ode.load("fashion-mnist", clip=1.0, threshold=0.995)
    assert (loaded.clip, loaded.threshold, loaded.clips) == (1.0, 0.995, True)
    x = ddim_ode.sample(loaded, n=1, steps=2, solver="ddim").x
    assert float(x.abs().max()) <= 1.0 + 1e-6


# -- networks of other makes --------------------------------------------------------------------
EXACT = GaussianEpsilon(torch.tensor([0.3, -0.5, 0.1]), torch.tensor([0.2, 0.7, 1.5]))


def _denoised(x_bar, sigma):
    """E[x₀ | x̄] by the textbook: (λ x̄ + σ² μ)/(λ + σ²)."""
    mean, variance = torch.tensor([0.3, -0.5, 0.1]).double(), torch.tensor([0.2, 0.7, 1.5]).double()
    return (variance * x_bar + sigma**2 * mean) / (variance + sigma**2)


@pytest.mark.parametrize("sigma", [0.02, 0.4, 3.0, 50.0])
def test_other_makes_are_the_same_field(sigma):
    """A denoiser, scores in both coordinates and a velocity, each asked with its own library's input and label."""
    x_bar = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * (1 + sigma)
    asked = []

    def denoiser(x, s):
        asked.append(("denoiser", x, s))
        return _denoised(x, s.reshape(-1, 1))

    def vp_score(x, t):  # of x = x̄ √α, with t in (0, 1]
        asked.append(("vp", x, t))
        return _score(x, NoiseSchedule.continuous(0.1, 20.0).sigma(float(t[0])), scale=True)

    def ve_score(x, s):
        asked.append(("ve", x, s))
        return _score(x, float(s[0]), scale=False)

    def _score(x, s, scale):
        root = (1 + s * s) ** 0.5 if scale else 1.0
        return root * (_denoised(x * root, s) - x * root) / s**2

    def velocity(x, t):
        asked.append(("flow", x, t))
        s = float(t[0] / (1 - t[0]))
        mine = x * (1 + s)
        x0 = _denoised(mine, s)
        return (mine - x0) / s - x0

    edm = NoiseSchedule.edm(0.002, 80.0)
    fields = [
        EpsilonField.from_denoiser(denoiser, edm),
        EpsilonField.from_denoiser(denoiser, LINEAR),
        EpsilonField.from_score(vp_score, NoiseSchedule.continuous(0.1, 20.0)),
        EpsilonField.from_score(ve_score, edm, coordinates="exploding"),
        EpsilonField.from_velocity(velocity),
        EpsilonField.from_sigma(EXACT, LINEAR),
    ]
    for field in fields:
        torch.testing.assert_close(field(x_bar, sigma), EXACT(x_bar, sigma), rtol=1e-8, atol=1e-8)
    inputs = {name: (x, float(label[0])) for name, x, label in asked}
    torch.testing.assert_close(inputs["denoiser"][0], x_bar)
    torch.testing.assert_close(inputs["flow"][0], x_bar / (1 + sigma))
    assert inputs["denoiser"][1] == sigma
    assert inputs["ve"][1] == sigma
    assert inputs["flow"][1] == pytest.approx(sigma / (1 + sigma))
    assert inputs["vp"][1] == pytest.approx(NoiseSchedule.continuous(0.1, 20.0).t(sigma))


def test_a_denoiser_below_its_first_level_is_asked_at_it():
    seen = []
    field = EpsilonField.from_denoiser(lambda x, s: seen.append(float(s[0])) or 0.5 * x, NoiseSchedule.edm(0.002, 80.0))
    x = torch.ones(1, 3, dtype=torch.float64)
    torch.testing.assert_close(field(x, 0.0), 0.5 * x / 0.002)
    assert seen == [0.002]


def test_flow_models_are_solved_along_their_own_line():
    """Euler's steps in t on x' = v, the loop of flow-matching libraries, converge to what a high-order solver finds here."""
    schedule = NoiseSchedule.flow()

    def velocity(x, t):
        s = float(t[0] / (1 - t[0]))
        x0 = _denoised(x * (1 + s), s)
        return (x * (1 + s) - x0) / s - x0

    latent = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    field = EpsilonField.from_velocity(velocity, schedule)
    found = ddim_ode.sample(field, latent, solver="ab4-rk", grid="asinh", steps=400).x
    sigma = schedule.sigma_max
    x, times = latent * (1 + sigma**2) ** 0.5 / (1 + sigma), np.linspace(schedule.T, 1e-3, 20_001)
    for t, after in itertools.pairwise(times):
        x = x + (after - t) * velocity(x, torch.tensor([t]))
    torch.testing.assert_close(found, x, rtol=0, atol=5e-3)


def test_channels_last_leaves_other_layers_alone():
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv2d(4, 4, 3))
    EpsilonField(network, LINEAR, channels_last=True)
    assert network[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_training_mode_with_dropout_is_warned_about():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.warns(UserWarning, match=r"model.eval\(\)"):
        EpsilonField(network, LINEAR)
    EpsilonField(network.eval(), LINEAR)


# -- a noise level for each sample ---------------------------------------------------------------
LEVELS = [0.0, 0.3, 40.0]
SIGMAS = torch.tensor(LEVELS, dtype=torch.float64)


def one_by_one(field, **options):
    """Each sample at its own level, by the form that takes one level for all."""
    return torch.cat([field.bind(X[i : i + 1], (), rows=slice(i, i + 1))(X[i : i + 1], LEVELS[i]) for i in range(3)])


def wavy(x, t, *condition):
    out = torch.tanh(x) * torch.cos(t / 200.0).reshape(-1, 1, 1).to(x.dtype)
    return out * condition[0].reshape(-1, 1, 1) if condition else out


GIVEN, NULL = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([[0.5]]).double().reshape(1)


@pytest.mark.parametrize(
    "options",
    [
        *({"prediction": p} for p in PREDICTIONS),
        *({"prediction": "score", "coordinates": c} for c in ("preserving", "exploding", "flow")),
        {"label": "nearest"},
        {"label": "sigma"},
        {"dtype": torch.float32},
        {"condition": GIVEN},
        {"condition": NULL},
        {"condition": GIVEN, "null_condition": NULL, "guidance_scale": 2.5},
        {"clip": 0.4},
        {"threshold": 0.7},
    ],
    ids=str,
)
def test_a_level_for_each_sample_is_each_sample_at_its_level(options):
    field = EpsilonField(wavy, LINEAR, **options)
    found = field.bind(X, ())(X, SIGMAS, torch.arange(3))
    assert found.dtype == X.dtype
    tolerance = 1e-6 if "dtype" in options else 1e-12
    torch.testing.assert_close(found, one_by_one(field), rtol=tolerance, atol=tolerance)
    # Some of them, in another order: conditions go with their samples.
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(field.bind(X, ())(X[rows], SIGMAS[rows], rows), found[rows], rtol=1e-12, atol=1e-12)
    calls = field.nfe
    field.bind(X, ())(X, SIGMAS, torch.arange(3))
    assert field.nfe == calls + 1


def test_from_sigma_sees_a_column_of_levels():
    seen = []

    def eps(x_bar, sigma):
        seen.append(sigma)
        return sigma * x_bar

    out = EpsilonField.from_sigma(eps, LINEAR).bind(X.float(), ())(X.float(), SIGMAS, torch.arange(3))
    assert seen[0].shape == (3, 1, 1)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(out, X.float() * SIGMAS.float()[:, None, None])
