"""The network and its Gaussian part."""

import pytest
import torch

from ddim_ode import NoiseSchedule
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.models.unet import GaussianResidual, UNet, timestep_embedding

LINEAR = NoiseSchedule.linear()
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0]).reshape(1, 2, 2)
VARIANCE, REST = torch.tensor([2.0, 0.3]), 0.05
BASIS = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(0))).Q


def residual(network):
    return GaussianResidual(network, LINEAR, MEAN, VARIANCE, BASIS, REST)


@pytest.mark.parametrize("options", [{}, {"patch": 2}, {"blocks": 2, "attention": (8, 4)}, {"dropout": 0.1}])
def test_shapes_and_gradients(options):
    network = UNet(3, 16, 8, (1, 2), groups=4, **({"attention": (8,)} | options))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 512.5])
    out = network(x, t)
    assert out.shape == x.shape
    # The last layer starts at zero, and every parameter learns once it has moved.
    assert not out.any()
    torch.nn.init.normal_(network.conv_out.weight)
    for module in network.modules():
        for name in ("conv2", "proj_out"):
            if hasattr(module, name):
                torch.nn.init.normal_(getattr(module, name).weight)
    network(x, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_papers_cifar_network_has_its_size():
    with torch.device("meta"):
        network = UNet(3, 32, 128, (1, 2, 2, 2), 2, (16,), 32, 0.1)
    # 35.7 million parameters: Ho et al. 2020, appendix B.
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def test_names_are_the_authors():
    names = set(UNet(3, 16, 8, (1, 2), attention=(8,), groups=4).state_dict())
    for name in (
        "temb.dense.0.weight", "conv_in.weight", "down.0.block.0.norm1.weight", "down.0.block.0.temb_proj.bias",
        "down.0.downsample.conv.weight", "down.1.attn.0.q.weight", "mid.block_1.conv2.weight", "mid.attn_1.proj_out.bias",
        "up.0.block.1.nin_shortcut.weight", "up.1.upsample.conv.bias", "norm_out.weight", "conv_out.bias",
    ):  # fmt: skip
        assert name in names


def test_samples_do_not_see_each_other():
    network = UNet(1, 8, 8, (1, 2), attention=(4,), groups=4).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0])
    torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


def test_embeddings_are_smooth_in_the_label():
    t = torch.linspace(10, 12, 201, dtype=torch.float64)
    jumps = timestep_embedding(t, 32).diff(dim=0).abs().max()
    assert jumps < 0.0101


def test_residual_knows_sigma_between_the_labels():
    wrapped = residual(torch.nn.Identity())
    t = torch.arange(2998, dtype=torch.float64) / 3  # every third is a trained label
    exact = torch.from_numpy(LINEAR.sigma(t.numpy() + 1.0))
    torch.testing.assert_close(wrapped.sigma(t)[30:], exact[30:], rtol=1e-6, atol=0)
    torch.testing.assert_close(wrapped.sigma(t)[::3], exact[::3], rtol=1e-12, atol=0)


def test_residual_without_a_network_is_the_gaussian_optimum():
    class Nothing(torch.nn.Module):
        def forward(self, x, t):
            self.seen = x
            return torch.zeros_like(x[:, :1])

    nothing = Nothing()
    wrapped = residual(nothing)
    covariance = BASIS @ torch.diag(VARIANCE) @ BASIS.T + REST * (torch.eye(4) - BASIS @ BASIS.T)
    exact = GaussianEpsilon(MEAN, covariance)
    spread = float(covariance.trace()) / 4
    for t in (0, 250, 999):
        sigma = LINEAR.sigma(t + 1)
        x_bar = torch.randn(3, 1, 2, 2, dtype=torch.float64) * sigma + MEAN
        eps = exact(x_bar, sigma)
        out = wrapped((x_bar / (1 + sigma**2) ** 0.5).float(), torch.full((3,), float(t)))
        torch.testing.assert_close(out.double(), eps, rtol=1e-4, atol=1e-4)
        away, denoised = nothing.seen.double().chunk(2, dim=1)
        torch.testing.assert_close(away, (x_bar - MEAN) / (sigma**2 + spread) ** 0.5, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(denoised, (x_bar - sigma * eps - MEAN) / spread**0.5, rtol=1e-3, atol=1e-3)


def test_residual_keeps_its_precision_under_autocast():
    wrapped = residual(torch.nn.Conv2d(2, 1, 1))
    wrapped.network.forward = lambda x, t: torch.zeros_like(x[:, :1])
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([5.0, 800.0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wrapped(x, t), wrapped(x, t).float(), rtol=0, atol=0)
        cast = wrapped(x, t)
    torch.testing.assert_close(cast, wrapped(x, t), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"width": 0}, "width must be a whole number"),
        ({"width": 2, "groups": 1}, "at least 4"),
        ({"groups": 3}, "must divide every width"),
        ({"groups": 0}, "groups must be"),
        ({"patch": 0}, "patch must be"),
        ({"blocks": 0}, "blocks must be"),
        ({"multipliers": ()}, "must divide"),
    ],
)
def test_sizes_that_make_no_network_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        UNet(**({"resolution": 8, "width": 8, "multipliers": (1, 2), "groups": 4} | bad))


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="cannot be halved 2 times"):
        UNet(1, 30, 8, (1, 2, 2), groups=4)
