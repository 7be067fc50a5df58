"""The checker: what is right passes, and each usual mistake is named."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import ddim_ode
from ddim_ode import EpsilonField, NoiseSchedule
from ddim_ode.checking import check
from ddim_ode.cli import main
from ddim_ode.models.analytic import GaussianEpsilon, MixtureEpsilon

LINEAR = NoiseSchedule.linear()
GENERATOR = torch.Generator().manual_seed(0)
SHAPE = (1, 6, 6)
ROOTS = torch.randn(3, 36, 36, generator=GENERATOR, dtype=torch.float64) * 0.006
MIXTURE = MixtureEpsilon(
    torch.ones(3),
    torch.rand(3, *SHAPE, generator=GENERATOR, dtype=torch.float64) * 1.4 - 0.7,
    ROOTS @ ROOTS.transpose(1, 2) + 3e-5 * torch.eye(36, dtype=torch.float64),
)
IMAGES = MIXTURE.sample(64, GENERATOR).clamp(-1, 1)


class Network(nn.Module):
    """The exact ε as a network would hold it: of x and a label, 0-based; it predicts what it is told to."""

    def __init__(self, prediction="epsilon", schedule=LINEAR, label=lambda t: t + 1.0):
        super().__init__()
        self.prediction, self.schedule, self.to_time = prediction, schedule, label
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        time = np.clip(self.to_time(t.double().numpy()), self.schedule.t_min, self.schedule.T)
        out = []
        # A run of equal labels at once.
        parts = np.flatnonzero(np.diff(time, prepend=np.nan))
        for rows, sigma in zip(np.split(np.arange(len(x)), parts[1:]), self.schedule.sigma(time[parts]), strict=True):
            x_bar = x[rows] * (1 + sigma**2) ** 0.5
            eps, alpha = MIXTURE(x_bar, float(sigma)), 1 / (1 + sigma**2)
            x0 = x_bar - sigma * eps
            out.append({
                "epsilon": eps, "sample": x0, "v_prediction": alpha**0.5 * eps - (1 - alpha) ** 0.5 * x0,
                "score": -eps / (1 - alpha) ** 0.5, "flow": eps - x0,
            }[self.prediction])  # fmt: skip
        return torch.cat(out)


def wrong(field, images=IMAGES):
    report = check(field, images)
    found = {f.check: f.text for f in report.findings if f.verdict == "wrong"}
    assert report.ok == (not found)
    return found


def notes(field):
    return {f.check: f.text for f in check(field, IMAGES).findings if f.verdict == "note"}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score", "flow"])
def test_right_declarations_pass(prediction):
    field = EpsilonField(Network(prediction), LINEAR, prediction)
    report = check(field, IMAGES)
    assert report.ok, str(report)
    assert all(f.verdict == "ok" for f in report.findings if f.check != "determinism")
    assert field.nfe == 0  # the user's own counter is left alone
    assert report.nfe > 0
    assert report.loss[0.1] < 1.0


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score", "flow"])
@pytest.mark.parametrize("declared", ["epsilon", "v_prediction"])
def test_a_wrong_prediction_type_is_named(prediction, declared):
    found = wrong(EpsilonField(Network(prediction), LINEAR, declared))
    if prediction == declared:
        assert not found
    else:
        assert list(found) == ["prediction"]
        assert f'declare prediction="{prediction}"' in found["prediction"]


@pytest.mark.parametrize("total", [2, 3, 5, 10, 20])
def test_short_schedules_are_asked_for_labels_they_have(total):
    """A network that indexes a table with its labels raises on any other."""
    schedule = NoiseSchedule.linear(total, 0.1 / total, 0.9)
    network = Network(schedule=schedule)

    def strict(x, t):
        assert 0 <= t.min() <= t.max() <= total - 1, t
        return network(x, t)

    assert not wrong(EpsilonField(strict, schedule))


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_labels_that_are_off_are_caught(shift):
    found = wrong(EpsilonField(Network(label=lambda t: t + 1.0 + shift), LINEAR))
    assert list(found) == ["label"]
    # A network that counts one more wants labels of one less.
    off = float(re.search(r"at labels ([+-][\d.]+) of", found["label"]).group(1))
    assert off == pytest.approx(-shift, abs=0.5)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (lambda t: 1000.0 * t + 1.0, "a thousandth of those"),
        (lambda t: t / 1000.0 + 1.0, "a thousand times those"),
        (lambda t: 1000.0 - t, "counted from the other end"),
    ],
)
def test_labels_of_another_scale_are_named(label, says):
    assert says in wrong(EpsilonField(Network(label=label), LINEAR))["label"]


def test_another_schedule_shows_in_the_labels():
    found = wrong(EpsilonField(Network(schedule=NoiseSchedule.scaled_linear()), LINEAR))
    assert "label" in found


def test_labels_that_are_rounded_are_noted():
    assert "rounded to integers, as declared" in notes(EpsilonField(Network(), LINEAR, label="nearest"))["fraction"]
    rounding = Network(label=lambda t: np.rint(t) + 1.0)
    assert 'declare label="nearest"' in notes(EpsilonField(rounding, LINEAR))["fraction"]
    halves = Network(label=lambda t: np.rint(2.0 * t) / 2.0 + 1.0)
    assert "near 99 and 899" in notes(EpsilonField(halves, LINEAR))["fraction"]
    coarse = Network(label=lambda t: torch.from_numpy(t).bfloat16().double().numpy() + 1.0)
    assert "half precision" in notes(EpsilonField(coarse, LINEAR))["fraction"]


def test_a_network_that_indexes_with_its_labels_says_what_to_declare():
    class Table(Network):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1000, 1)

        def forward(self, x, t):
            return super().forward(x, t) + 0.0 * self.table(t).mean()

    assert 'declare label="nearest"' in wrong(EpsilonField(Table(), LINEAR))["call"]
    assert not wrong(EpsilonField(Table(), LINEAR, label="nearest"))


def test_dropout_in_training_mode():
    class Dropping(Network):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.1)

        def forward(self, x, t):
            return self.dropout(super().forward(x, t))

    with pytest.warns(UserWarning, match="training mode"):
        field = EpsilonField(Dropping(), LINEAR)
    assert "call model.eval()" in wrong(field)["determinism"]
    assert "in training mode" in notes(EpsilonField(Network().train(), LINEAR))["determinism"]
    assert not wrong(EpsilonField(Dropping().eval(), LINEAR))


def test_neighbours_that_disturb_each_other():
    class Mixing(Network):
        def forward(self, x, t):
            out = super().forward(x, t)
            return out + 0.02 * out.mean(dim=0, keepdim=True)

    assert "neighbours in the batch" in wrong(EpsilonField(Mixing(), LINEAR))["batch"]
    mixed = [
        lambda out: out + 0.05 * out[:1],
        lambda out: out + 0.1 * out[:4].mean(0),
        lambda out: out.cumsum(0) / torch.arange(1, len(out) + 1).reshape(-1, 1, 1, 1),
        lambda out: out + 0.1 * out.roll(1, 0),
    ]
    for mix in mixed:
        field = EpsilonField(lambda x, t, mix=mix: mix(Network()(x, t)), LINEAR, dtype=torch.float64)
        assert "neighbours in the batch" in wrong(field, IMAGES[:8])["batch"]
    # Nor does a coarse dtype hide it.
    low = EpsilonField(lambda x, t: Mixing()(x, t).bfloat16(), LINEAR, dtype=torch.float64)
    assert list(wrong(low)) == ["batch"]
    assert not wrong(EpsilonField(lambda x, t: Network()(x, t).bfloat16(), LINEAR, dtype=torch.float64))


def test_a_dtype_that_is_not_the_declared_one():
    field = EpsilonField(lambda x, t: Network()(x, t).bfloat16().float(), LINEAR, dtype=torch.float64)
    assert "look for autocast inside the model" in notes(field)["dtype"]
    single = EpsilonField(lambda x, t: Network()(x.float(), t).float(), LINEAR, dtype=torch.float64)
    assert "dtype" not in notes(single)


def test_images_of_another_range():
    found = wrong(EpsilonField(Network(), LINEAR), (IMAGES + 1) / 2)
    assert list(found) == ["range"]
    assert "[-1, 1]" in found["range"]


def test_ranges_of_images_whose_detail_is_faint():
    """Photographs' power falls with frequency: halved, they are much easier to denoise, and yet the range is right."""
    frequency = torch.fft.fftfreq(12, dtype=torch.float64)
    power = (frequency[:, None] ** 2 + frequency**2 + 1e-3) ** -1.2
    rows = torch.fft.ifft2(power).real
    covariance = torch.stack([rows.roll((i, j), (0, 1)).flatten() for i in range(12) for j in range(12)])
    covariance *= 0.25 / covariance.diagonal().mean()
    exact = GaussianEpsilon(torch.zeros(1, 12, 12), covariance)
    root = exact.basis * exact.variance.sqrt()
    images = (torch.randn(48, 144, generator=GENERATOR, dtype=torch.float64) @ root.T).reshape(-1, 1, 12, 12)
    assert float(images.min()) < -0.5
    field = EpsilonField.from_sigma(exact, LINEAR)
    assert not wrong(field, images)
    assert "[-1, 1]" in wrong(field, (images.clamp(-1, 1) + 1) / 2)["range"]


def test_a_model_that_cannot_be_called_or_returns_no_numbers():
    assert (
        "cannot be called: boom" in wrong(EpsilonField(lambda x, t: exec("raise RuntimeError('boom')"), LINEAR))["call"]
    )
    assert "NaN" in wrong(EpsilonField(lambda x, t: x * torch.nan, LINEAR))["call"]
    layer = nn.Linear(6, 6)
    assert "declare dtype=torch.float32" in wrong(EpsilonField(lambda x, t: layer(x), LINEAR))["call"]
    assert "(1, 1, 6, 6)" in wrong(EpsilonField(lambda x, t: x[:1], LINEAR))["call"]


def test_an_untrained_network_is_no_better_than_the_variance():
    found = wrong(EpsilonField(lambda x, t: 0.0 * x, LINEAR))
    assert "untrained, trained on other data" in found["loss"]
    # Of a few images that is no more than chance: their variance is not that of the noise they met.
    knowing = lambda x, sigma: (x - IMAGES[:2].mean()) * (sigma / (float(IMAGES[:2].var(correction=0)) + sigma**2))
    few = EpsilonField.from_sigma(lambda x, sigma: 1.0001 * knowing(x, sigma), LINEAR)
    assert not wrong(few, IMAGES[:2])


def test_worse_weights_have_a_larger_loss():
    """What an average is for: the checker tells by the loss, and cannot by anything else."""

    class Noisy(Network):
        def forward(self, x, t):
            pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            return super().forward(x, t) + 0.1 * pattern

    good, bad = (check(EpsilonField(network, LINEAR), IMAGES).loss for network in (Network(), Noisy()))
    assert all(bad[s] > good[s] for s in good)


def test_other_kinds_of_field():
    denoise = lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * MIXTURE(x, float(sigma[0]))
    assert not wrong(EpsilonField.from_denoiser(denoise, NoiseSchedule.edm(), shape=SHAPE))
    assert not wrong(EpsilonField.from_sigma(MIXTURE, LINEAR))
    quarter = lambda x, c: denoise(x, (4.0 * c).exp())
    assert "a quarter of their logarithm" in wrong(EpsilonField.from_denoiser(quarter, NoiseSchedule.edm()))["label"]


def test_guidance_is_not_what_is_judged():
    class Conditional(Network):
        def forward(self, x, t, condition):
            return super().forward(x, t) * (1.0 + 0.3 * condition.reshape(-1, 1, 1, 1))

    given, null = torch.zeros(1), torch.ones(1)
    assert not wrong(EpsilonField(Conditional(), LINEAR, condition=given, null_condition=null, guidance_scale=5.0))


def test_half_precision_is_noted():
    class Half(Network):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(self, x, t):
            return super().forward(x.double(), t).to(torch.bfloat16)

    assert "bfloat16" in notes(EpsilonField(Half(), LINEAR))["dtype"]


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        check(EpsilonField(Network(), LINEAR), IMAGES[:1])
    with pytest.raises(ValueError, match="images must be finite"):
        check(EpsilonField(Network(), LINEAR), IMAGES * torch.nan)


def test_the_command(capsys):
    options = json.dumps({"network": None})
    assert main(["check", "--n", "8", "--json", "--model-options", options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"]
    assert [f["check"] for f in record["findings"]][:3] == ["call", "determinism", "dtype"]
    assert main(["check", "--n", "1"]) == 2
    assert main(["check", "--model-options", "{"]) == 2
    assert "not JSON" in capsys.readouterr().err
    assert main(["check", "--model-options", '{"prediktion": "v"}']) == 2
    assert "does not know 'prediktion'" in capsys.readouterr().err
    for options in ('{"schedule": "linear"}', '{"label": 3}', '{"guidance_scale": "much"}'):
        assert main(["check", "--model-options", options]) == 2
        assert capsys.readouterr().err.startswith("ddim-ode: ")


def test_bundled_network_is_what_it_says():
    field = ddim_ode.load("fashion-mnist")
    images = ddim_ode.data.as_tensor(ddim_ode.data.bundled_images()[:16])
    assert check(field, images).ok
    shifted = EpsilonField(lambda x, t: field.model(x, t + 1.0), LINEAR, dtype=torch.float32, shape=(1, 28, 28))
    assert "counts from 0 or from 1" in wrong(shifted, images)["label"]
