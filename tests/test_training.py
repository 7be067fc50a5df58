"""Training: eq. 5, resumed runs, and the loss by noise level."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddim_ode import NoiseSchedule
from ddim_ode.data import as_tensor
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.models.unet import UNet
from ddim_ode.training import TrainingOptions, _batch, begin, principal, sigma_loss, spread, train

LINEAR = NoiseSchedule.linear()
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
OPTIONS = TrainingOptions(steps=8, batch_size=8, lr=1e-2, warmup=2, flip=True, seed=3, autocast=False)


def network():
    torch.manual_seed(0)
    return UNet(1, 8, 8, (1, 2), attention=(4,), groups=4)


def log(folder):
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def weights(module):
    return torch.cat([p.flatten() for p in module.parameters()])


def test_the_loss_falls(tmp_path):
    options = TrainingOptions(steps=60, batch_size=16, lr=5e-3, warmup=5, cooldown=0.5, autocast=False)
    train(network(), IMAGES, LINEAR, tmp_path, options, save_every=20)
    header, *rows = log(tmp_path)
    assert header == ["step", "loss", "learning_rate", "seconds"]
    assert [int(row[0]) for row in rows] == [20, 40, 60]
    assert float(rows[-1][1]) < 0.6 * float(rows[0][1])


def test_an_interrupted_run_is_the_whole_run(tmp_path):
    class Stop(Exception):
        pass

    def interrupt(step, loss):
        if step == 5:
            raise Stop

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(network(), IMAGES, LINEAR, tmp_path / "whole", OPTIONS, save_every=3)
    with pytest.raises(Stop):
        train(network(), IMAGES, LINEAR, tmp_path / "parts", OPTIONS, save_every=3, progress=interrupt)
    resumed = train(network(), IMAGES, LINEAR, tmp_path / "parts", OPTIONS, save_every=3)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    # All but the seconds are the same.
    assert [row[:3] for row in log(tmp_path / "parts")] == [row[:3] for row in log(tmp_path / "whole")]
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"checkpoint.pt", "log.csv"}


def test_a_run_goes_on_under_its_own_options_only(tmp_path):
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)
    written = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run with lr = 0\.01, not 0\.1, seed = 3, not 4"):
        train(network(), IMAGES, LINEAR, tmp_path, replace(OPTIONS, lr=0.1, seed=4, steps=9))
    assert (tmp_path / "checkpoint.pt").read_bytes() == written
    train(network(), IMAGES, LINEAR, tmp_path, replace(OPTIONS, steps=9))
    assert log(tmp_path)[-1][0] == "9"


def test_other_images_are_another_run(tmp_path):
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="on other images"):
        train(network(), IMAGES[::-1], LINEAR, tmp_path, replace(OPTIONS, steps=9))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    def poison(step, loss):
        if step == 5:
            with torch.no_grad():
                made.conv_in.weight.fill_(torch.nan)

    made = network()
    with pytest.raises(ValueError, match=r"the loss became nan before step 8; what was saved before step 5 is kept"):
        train(made, IMAGES, LINEAR, tmp_path, OPTIONS, save_every=4, progress=poison)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 4
    assert all(bool(x.isfinite().all()) for x in kept["network"].values())


def test_a_cut_checkpoint_is_refused(tmp_path):
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match="lacks average, images"):
        train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)


def test_a_log_without_a_checkpoint_begins_anew(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,learning_rate,seconds\n4,0.1,0.1,0.1\n", encoding="utf-8")
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS, save_every=4)
    assert [row[0] for row in log(tmp_path)] == ["step", "4", "8"]


def test_dropout_resumes_too(tmp_path):
    def dropping():
        torch.manual_seed(0)
        return UNet(1, 8, 8, (1, 2), attention=(4,), groups=4, dropout=0.3)

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = train(dropping(), IMAGES, LINEAR, tmp_path / "whole", replace(OPTIONS, cooldown=0.0))
    train(dropping(), IMAGES, LINEAR, tmp_path / "parts", replace(OPTIONS, cooldown=0.0, steps=4))
    torch.manual_seed(99)
    resumed = train(dropping(), IMAGES, LINEAR, tmp_path / "parts", replace(OPTIONS, cooldown=0.0))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_run_killed_between_its_last_checkpoint_and_its_files_writes_them(tmp_path):
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS)
    seen = []
    train(network(), IMAGES, LINEAR, tmp_path, OPTIONS, on_save=lambda average, step: seen.append(step))
    assert seen == [8]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    train(network(), IMAGES, LINEAR, tmp_path, replace(OPTIONS, steps=4), save_every=2)
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("6,0.1,0.1,0.1\n")
    train(network(), IMAGES, LINEAR, tmp_path, replace(OPTIONS, steps=6), save_every=2)
    assert [row[0] for row in log(tmp_path)] == ["step", "2", "4", "6"]


def test_the_average_is_one_and_gradients_are_clipped(tmp_path):
    """By hand, from the weights after each update."""
    states, norms, made = [], [], network()

    def watch(step, loss):
        states.append(weights(made).clone())

    for parameter in made.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    options = replace(OPTIONS, ema=0.6, clip=1e-9, lr=1e-3, warmup=1, cooldown=0.0)
    average = weights(network())
    result = train(made, IMAGES, LINEAR, tmp_path, options, progress=watch)
    for step, state in enumerate(states, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state
    torch.testing.assert_close(weights(result), average, rtol=1e-5, atol=1e-6)
    # AdamW's step is lr · m/(√v + 1e-8): with gradients clipped to 1e-9 in all, far below lr.
    assert float((states[0] - weights(network())).detach().abs().max()) < 0.2 * 1e-3


def test_images_without_variance_are_refused(tmp_path):
    for value in (0, 37, 255):
        with pytest.raises(ValueError, match="nothing to learn"):
            train(network(), np.full((40, 1, 8, 8), value, np.uint8), LINEAR, tmp_path, OPTIONS)
    assert not any(tmp_path.iterdir())


def test_a_continuous_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="discrete"):
        train(network(), IMAGES, NoiseSchedule.edm(), tmp_path, OPTIONS)


def test_batches_are_eq_4_with_labels_over_the_whole_range():
    _, std = spread(IMAGES)
    x, t, noise, weight = _batch(IMAGES, std**2, LINEAR, TrainingOptions(batch_size=40), 0)
    again = _batch(IMAGES, std**2, LINEAR, TrainingOptions(batch_size=40), 0)
    assert torch.equal(x, again[0])
    alpha = torch.from_numpy(LINEAR.alpha(t.double().numpy() + 1)).float().reshape(-1, 1, 1, 1)
    clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    # At small t the picture can be read back from x exactly; an epoch shows each image once.
    early = int(torch.nonzero(t < 700).flatten()[-1])
    known = as_tensor(IMAGES)
    for i in range(early):
        assert (clean[i] - known).abs().flatten(1).amax(1).min() < 1e-3
    assert float(t.max() - t.min()) > 950
    assert bool((t.diff() > 0).all())
    assert bool((weight == 1).all())


def test_weights_follow_gamma():
    _, _, _, weight = _batch(IMAGES, 0.25, LINEAR, TrainingOptions(gamma=0.5), 0)
    _, t, _, _ = _batch(IMAGES, 0.25, LINEAR, TrainingOptions(gamma=0.5), 0)
    sigma = torch.from_numpy(LINEAR.sigma(t.double().numpy() + 1))
    torch.testing.assert_close(weight.flatten().double(), (1 + sigma**2 / 0.25).sqrt(), rtol=1e-3, atol=0)


def test_spread():
    mean, std = spread(IMAGES)
    x = as_tensor(IMAGES, torch.float64)
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert std == pytest.approx(float((x - x.mean(0)).square().mean().sqrt()))


def test_principal_directions():
    x = as_tensor(IMAGES, torch.float64).flatten(1)
    mean, variance, basis, rest = principal(IMAGES, 10)
    exact = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    torch.testing.assert_close(mean.flatten().double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact[:10], rtol=1e-5, atol=1e-6)
    assert rest == pytest.approx(float(exact[10:].mean()), rel=1e-6)
    turned = (x - x.mean(0)) @ basis.double()
    torch.testing.assert_close(torch.cov(turned.T, correction=0), torch.diag(exact[:10]), rtol=1e-4, atol=1e-5)


def test_principal_directions_without_a_covariance():
    random = np.random.default_rng(0)
    flat = random.normal(size=(300, 64)) * 60.0 * 0.8 ** np.arange(64) @ np.linalg.qr(random.normal(size=(64, 64)))[0]
    images = np.clip(flat + 127.5, 0, 255).round().astype(np.uint8).reshape(300, 1, 8, 8)
    whole, few = principal(images, 10), principal(images, 10, dense=63)
    torch.testing.assert_close(few[0], whole[0])
    torch.testing.assert_close(few[1], whole[1], rtol=1e-4, atol=0)
    assert few[3] == pytest.approx(whole[3], rel=1e-4)
    torch.testing.assert_close((few[2].T @ whole[2]).abs(), torch.eye(10), rtol=0, atol=1e-2)


def test_sigma_loss_of_an_exact_model_is_known():
    """For data N(0, s²) the least possible loss is s²/(s² + σ²)."""
    values = np.clip(np.random.default_rng(1).normal(127.5, 30, (4000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
    variance = (30 / 127.5) ** 2
    exact = GaussianEpsilon(torch.zeros(1, 4, 4), torch.full((1, 4, 4), variance))
    found = sigma_loss(exact, values, [0.1, 1.0], dtype=torch.float64)
    for sigma, loss in found.items():
        assert loss == pytest.approx(variance / (variance + sigma**2), rel=0.03)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"ema": 1.5},
        {"cooldown": -0.1},
        {"gamma": np.nan},
        {"lr": np.inf},
        {"seed": -1},
    ],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingOptions(**bad)


def test_a_rank_beyond_the_images_is_refused():
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 64\]"):
        begin(IMAGES, LINEAR, rank=65)


def test_a_plain_network_needs_no_covariance(monkeypatch):
    monkeypatch.setattr("ddim_ode.training.principal", None)
    network, description = begin(IMAGES, LINEAR, rank=0, width=16, multipliers=[1, 2], blocks=1, attention=[], groups=4)
    assert isinstance(network, UNet)
    assert description["residual"] is None
    with pytest.raises(ValueError, match="takes square images"):
        begin(IMAGES[:, :, :4], LINEAR, rank=0)


def test_learning_rate_rises_holds_and_falls():
    options = TrainingOptions(steps=100, lr=1.0, warmup=10, cooldown=0.5)
    rates = [options.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[-1] == pytest.approx(0.02)
