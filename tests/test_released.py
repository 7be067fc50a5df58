"""Others' weights by name: the same numbers as an independent implementation's with the same weights."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ddim_ode
from ddim_ode import NoiseSchedule
from ddim_ode.cli import main
from ddim_ode.models.guided import GuidedUNet, read_config
from ddim_ode.models.released import build_released
from ddim_ode.models.unet import UNet
from tests.test_pipelines import diffusers, randomised

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


AUTHORS = {
    "channels": 3,
    "resolution": 32,
    "width": 32,
    "multipliers": (1, 2, 2, 2),
    "blocks": 2,
    "attention": (16,),
    "groups": 32,
}


@pytest.fixture(scope="module")
def authors():
    """Their layout at a quarter of the width of their CIFAR-10 network."""
    return randomised(UNet(**AUTHORS))


# -- the authors' ddim ------------------------------------------------------------------------------
def as_diffusers(state):
    """The authors' names in diffusers' words: an implementation that shares nothing with this package's."""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "temb":
            new = f"time_embedding.linear_{int(parts[2]) + 1}.{parts[-1]}"
        elif parts[0] in ("conv_in", "conv_out"):
            new = name
        elif parts[0] == "norm_out":
            new = f"conv_norm_out.{parts[-1]}"
        else:
            if parts[0] == "mid":
                i = parts[1].split("_")[1]
                head = f"mid_block.{'resnets' if parts[1].startswith('block') else 'attentions'}.{int(i) - 1}"
                rest = parts[2:]
            else:
                # Up stages are counted from the finest here and from the coarsest there.
                level = int(parts[1]) if parts[0] == "down" else 3 - int(parts[1])
                kind = {
                    "block": "resnets",
                    "attn": "attentions",
                    "downsample": "downsamplers",
                    "upsample": "upsamplers",
                }[parts[2]]
                at, rest = (parts[3], parts[4:]) if kind in ("resnets", "attentions") else ("0", parts[3:])
                head = f"{parts[0]}_blocks.{level}.{kind}.{at}"
            words = {
                "temb_proj": "time_emb_proj",
                "nin_shortcut": "conv_shortcut",
                "q": "to_q",
                "k": "to_k",
                "v": "to_v",
                "proj_out": "to_out.0",
            }
            words["norm"] = "group_norm"
            new = f"{head}.{words.get(rest[0], rest[0])}.{rest[-1]}"
            if rest[0] in ("q", "k", "v", "proj_out"):
                tensor = tensor.reshape(tensor.shape[0], -1) if tensor.ndim == 4 else tensor
        out[new] = tensor
    return out


def test_the_authors_network_is_diffusers_with_the_same_weights(authors, tmp_path):
    other = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64, 64), layers_per_block=2, norm_num_groups=32, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), attention_head_dim=None,
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip
    other.load_state_dict(as_diffusers(authors.state_dict()))
    torch.save(authors.state_dict(), tmp_path / "model-790000.ckpt")
    field = ddim_ode.load(tmp_path / "model-790000.ckpt")
    assert field.shape == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    for label in (0.0, 123.5, 999.0):
        sigma = float(field.schedule.sigma(label + 1.0))
        with torch.no_grad():
            wanted = other(x, torch.tensor([label, label])).sample
        torch.testing.assert_close(field(x * (1 + sigma**2) ** 0.5, sigma), wanted, rtol=1e-4, atol=1e-5)


def test_lists_prefixes_and_averages(authors, tmp_path):
    """What their training code saves, and the average in it."""
    last = authors.state_dict()
    average = {name: 0.5 * tensor for name, tensor in last.items()}
    path = tmp_path / "ckpt.pth"
    torch.save([{f"module.{k}": v for k, v in last.items()}, {"state": {}, "param_groups": []}, 3, 1000, average], path)

    def first(field):
        return field.model.conv_in.weight

    torch.testing.assert_close(first(ddim_ode.load(path)), average["conv_in.weight"])
    assert "the moving average of the weights" in ddim_ode.load(path).notes[0]
    torch.testing.assert_close(first(ddim_ode.load(path, ema=True)), average["conv_in.weight"])
    torch.testing.assert_close(first(ddim_ode.load(path, ema=False)), last["conv_in.weight"])
    assert "no average" in ddim_ode.load(path, ema=False).notes[0]
    torch.save([last, {}, 3, 1000], path)
    torch.testing.assert_close(first(ddim_ode.load(path)), last["conv_in.weight"])
    with pytest.raises(ValueError, match="holds no moving average"):
        ddim_ode.load(path, ema=True)
    torch.save({"model": last, "ema": average, "step": 3}, path)
    torch.testing.assert_close(first(ddim_ode.load(path)), average["conv_in.weight"])
    torch.testing.assert_close(first(ddim_ode.load(path, ema=False)), last["conv_in.weight"])
    for kept in (
        {"ema_model": average},
        {"ema_params": average},
        {"ema": {"decay": 0.999, "num_updates": 3, "shadow": average}},
        {"model_ema": {"module": "EMA", "state_dict": average}},
    ):
        torch.save({"model": last} | kept, path)
        torch.testing.assert_close(first(ddim_ode.load(path)), average["conv_in.weight"])
        assert "the moving average" in ddim_ode.load(path).notes[0]
        assert ddim_ode.load(path, ema=False).notes[0] == "the last weights, no average"
    # torch_ema's average is a list without names.
    for name, kept in (("ema", {"shadow_params": list(average.values())}), ("averaged_model", average)):
        torch.save({"model": last, name: kept, "ema_decay": 0.999}, path)
        field = ddim_ode.load(path)
        torch.testing.assert_close(first(field), last["conv_in.weight"])
        assert field.notes[0] == f"the last weights; the file also holds '{name}', which is not of a form known here"
    save_file(last, tmp_path / "plain.safetensors")
    field = ddim_ode.load(tmp_path / "plain.safetensors")
    torch.testing.assert_close(first(field), last["conv_in.weight"])
    assert "do not say whether" in field.notes[0]


# -- improved- and guided-diffusion -----------------------------------------------------------------
def guided_as_diffusers(state, blocks, levels):
    """Their names in diffusers' words, for blocks that resample and one head size."""
    out = {}
    words = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
        "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    }  # fmt: skip
    per = blocks + 1
    for name, tensor in state.items():
        parts = name.split(".")
        end = parts[-1]
        if parts[0] == "time_embed":
            out[f"time_embedding.linear_{1 if parts[1] == '0' else 2}.{end}"] = tensor
            continue
        if parts[0] == "label_emb":
            out[f"class_embedding.{end}"] = tensor
            continue
        if name.startswith("input_blocks.0."):
            out[f"conv_in.{end}"] = tensor
            continue
        if parts[0] == "out":
            out[f"{'conv_norm_out' if parts[1] == '0' else 'conv_out'}.{end}"] = tensor
            continue
        if parts[0] == "middle_block":
            place, inner = int(parts[1]), parts[2:]
            head = "mid_block.attentions.0" if place == 1 else f"mid_block.resnets.{place // 2}"
        else:
            i, place, inner = int(parts[1]), int(parts[2]), parts[3:]
            if parts[0] == "input_blocks":
                level, at = divmod(i - 1, per)
                head = f"down_blocks.{level}." + (
                    "downsamplers.0" if at == blocks else ("resnets" if place == 0 else "attentions") + f".{at}"
                )
            else:
                level, at = divmod(i, per)
                is_up = place > 0 and inner[0] in ("in_layers", "emb_layers", "out_layers")
                head = f"up_blocks.{level}." + (
                    "upsamplers.0" if is_up else ("resnets" if place == 0 else "attentions") + f".{at}"
                )
        key = ".".join(inner[:-1])
        if inner[0] in ("norm", "qkv", "proj_out"):
            if inner[0] == "norm":
                out[f"{head}.group_norm.{end}"] = tensor
            elif inner[0] == "proj_out":
                out[f"{head}.to_out.0.{end}"] = tensor.squeeze(-1)
            else:
                # The older order: heads first, then q, k, v of each.
                flat = tensor.squeeze(-1)
                heads = flat.shape[0] // 3 // 8
                per_head = flat.reshape(heads, 3, 8, *flat.shape[1:])
                for j, letter in enumerate("qkv"):
                    out[f"{head}.to_{letter}.{end}"] = per_head[:, j].reshape(-1, *flat.shape[1:])
        else:
            out[f"{head}.{words[key]}.{end}"] = tensor
    return out


@pytest.mark.parametrize("classes", [None, 7])
def test_guided_networks_are_diffusers_with_the_same_weights(classes, tmp_path):
    config = {
        "channels": 3, "width": 32, "multipliers": (1, 2), "blocks": 2, "attention": (1,), "learned_variance": True,
        "classes": classes, "head_channels": 8, "scale_shift": True, "resample_blocks": True,
    }  # fmt: skip
    network = randomised(GuidedUNet(**config))
    other = diffusers.UNet2DModel(
        sample_size=16, out_channels=6, block_out_channels=(32, 64), layers_per_block=2, norm_eps=1e-5,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), resnet_time_scale_shift="scale_shift",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8, downsample_type="resnet",
        upsample_type="resnet", flip_sin_to_cos=True, freq_shift=0, num_class_embeds=classes, attn_norm_num_groups=32,
    ).eval()  # fmt: skip
    other.load_state_dict(guided_as_diffusers(network.state_dict(), 2, 2))
    path = tmp_path / "ema_0.9999_050000.pt"
    torch.save(network.state_dict(), path)
    given = {} if classes is None else {"class_labels": [1, 6]}
    field = ddim_ode.load(path, network={"head_channels": 8, "resolution": 16}, **given)
    assert field.shape == (3, 16, 16)
    x = torch.randn(2, 3, 16, 16)
    for label in (0.0, 61.5, 999.0):
        sigma = float(field.schedule.sigma(label + 1.0))
        with torch.no_grad():
            labels = None if classes is None else torch.tensor([1, 6])
            wanted = other(x, torch.tensor([label, label]), class_labels=labels).sample[:, :3]
        torch.testing.assert_close(field(x * (1 + sigma**2) ** 0.5, sigma), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {
            "width": 32,
            "multipliers": (1, 2),
            "blocks": 3,
            "attention": (1,),
            "scale_shift": False,
            "learned_variance": False,
        },
        {
            "width": 64,
            "multipliers": (0.5, 1, 2),
            "blocks": 1,
            "attention": (1, 2),
            "resample_blocks": True,
            "classes": 4,
        },
        {"width": 32, "multipliers": (1, 1, 2, 2), "blocks": 2, "attention": (), "channels": 1},
    ],
)
def test_shapes_tell_the_network(config):
    network = GuidedUNet(**config)
    found = read_config(network.state_dict())
    assert {k: found[k] for k in config} == config
    assert GuidedUNet(**found).load_state_dict(network.state_dict())


def attention_by_hand(layer, x, new_order):
    """One head after another, from the published formulas."""
    batch, channels = x.shape[:2]
    flat = x.reshape(batch, channels, -1)
    qkv = layer.qkv(layer.norm(flat))
    size, out = channels // layer.heads, []
    for h in range(layer.heads):
        rows = [slice(j * channels + h * size, j * channels + (h + 1) * size) for j in range(3)]
        if not new_order:
            rows = [slice((3 * h + j) * size, (3 * h + j + 1) * size) for j in range(3)]
        q, k, v = (qkv[:, r] for r in rows)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / size**0.5, dim=-1)
        out.append(torch.einsum("bts,bcs->bct", weights, v))
    return (flat + layer.proj_out(torch.cat(out, dim=1))).reshape(x.shape)


@pytest.mark.parametrize("new_order", [False, True])
def test_heads_are_split_in_either_order(new_order):
    network = randomised(GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=(0,), heads=4, new_order=new_order))
    layer = network.middle_block[1]
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(layer(x, x), attention_by_hand(layer, x, new_order), rtol=1e-4, atol=1e-5)
    same = GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=(0,), heads=4.0, new_order=new_order)  # of JSON
    same.load_state_dict(network.state_dict())
    torch.testing.assert_close(same.middle_block[1](x, x), layer(x, x))


def test_labels_of_other_lengths_are_scaled(tmp_path):
    """improved-diffusion's rescale_timesteps: a network of 4,000 steps is told t · 1000/4000."""
    network = randomised(GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=()))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    schedule = NoiseSchedule.cosine(4000)
    field = ddim_ode.load(tmp_path / "m.pt", schedule=schedule, network={"label_scale": 0.25})
    x, sigma = torch.randn(1, 3, 8, 8), float(schedule.sigma(2001.0))
    with torch.no_grad():
        wanted = network(x, torch.tensor([500.0]))
    torch.testing.assert_close(field(x * (1 + sigma**2) ** 0.5, sigma), wanted, rtol=1e-4, atol=1e-5)


def test_respaced_schedules_are_grids(tmp_path):
    """improved-diffusion's respacing keeps the α of some steps, which here is a grid of those labels."""
    schedule = NoiseSchedule.linear()
    kept = np.rint(np.arange(25) * (999 / 24)).astype(int)  # their "25"
    betas, last = [], 1.0
    for alpha in schedule.alphas_cumprod[kept]:
        betas.append(1 - alpha / last)
        last = alpha
    respaced = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - np.array(betas)))
    np.testing.assert_allclose(respaced.sigma(np.arange(1.0, 26.0)), schedule.sigma(kept + 1.0), rtol=1e-12)


# -- bad files ------------------------------------------------------------------------------------
def test_bad_weights_are_refused(authors, tmp_path):
    path = tmp_path / "w.pt"
    state = authors.state_dict()

    def refused(content, says, **options):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=says):
            ddim_ode.load(path, **options)

    torch.save(state, path)
    whole = path.read_bytes()
    refused(whole[: len(whole) // 2], "not a whole weights file")
    refused(b"", "not a whole weights file")
    refused(b"<html>not found</html>", "not a whole weights file|pickle")
    refused({"a": torch.zeros(1)}, "of a network not known here")
    refused({"epoch": 3}, "holds no weights: a dictionary of epoch")
    refused({k: v for k, v in state.items() if k != "conv_out.bias"}, r"missing \['conv_out.bias'\].*another network")
    for lost in ("conv_out.weight", "down.1.block.0.conv1.weight", "conv_in.weight"):
        refused({k: v for k, v in state.items() if k != lost}, f"lacks {lost}|not known here")
    refused(state | {"extra": torch.zeros(1)}, r"unknown \['extra'\]")
    refused(state | {"conv_out.bias": torch.zeros(9)}, r"conv_out.bias is \(9,\), not \(3,\)")
    refused(state, "knows no texts", prompt="a cat")
    refused(state, "knows no classes", class_labels=1)
    refused(state, "does not take heads", network={"heads": 4})
    guided = GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=(), classes=3).state_dict()
    refused(guided, "class-conditional: give class_labels=")
    refused(guided, "from 0 to 2", class_labels=3)
    large = GuidedUNet(channels=6, width=32, multipliers=(1,), blocks=1, attention=(), learned_variance=False)
    refused(large.state_dict(), "for super-resolution: wrap it by hand")
    attended = GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=(0,), heads=2).state_dict()
    for network in ({"heads": "two"}, {"heads": 2.5}, {"heads": 3}, {"head_channels": 0}):
        refused(attended, "^heads|^head_channels", network=network)
    for scale in ("1", None, True, 0, -1.0, float("nan")):
        refused(attended, "^label_scale must be a positive number", network={"label_scale": scale})
    refused(attended, "^new_order must be true or false, but got 'no'", network={"new_order": "no"})
    for content in (attended, state):
        for resolution in (-4, 16.5, "x", True):
            refused(content, "^resolution must be a whole number", network={"resolution": resolution})
        for network in ("abc", []):
            refused(content, "^network must be a dictionary", network=network)
        refused(content, "^ema must be true or false, but got 'yes'", ema="yes")
        refused(content, "not both", network={"resolution": 32}, shape=(3, 32, 32))
    refused(attended | {"time_embed.0.weight": torch.zeros(4)}, "a weight of too few dimensions")
    refused(state, "takes square images: give network=", shape=(3, 32, 32))
    refused(attended, "no network of .* can be built", network={"nonsense": 1})
    for lost in ("out.2.weight", "input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.emb_layers.1.weight"):
        refused({k: v for k, v in guided.items() if k != lost}, f"lacks {lost}")
    for said in ({"schedule": NoiseSchedule.linear()}, {"shape": (1, 28, 28)}):
        with pytest.raises(ValueError, match=f"says itself what it is: leave {next(iter(said))} out"):
            ddim_ode.load("fashion-mnist", **said)


def test_sizes_are_those_that_can_be_halved(tmp_path, capsys):
    path = tmp_path / "w.pt"
    torch.save(GuidedUNet(width=32, multipliers=(1, 1), blocks=1, attention=()).state_dict(), path)
    for given in ({"shape": (3, 16, 15)}, {"network": {"resolution": 15}}):
        with pytest.raises(ValueError, match="takes sizes that are multiples of 2, but the shape is"):
            ddim_ode.load(path, **given)
    with pytest.raises(ValueError, match="takes 3 channels"):
        ddim_ode.load(path, shape=(1, 16, 16))
    field = ddim_ode.load(path, shape=(3, 16, 8))
    assert ddim_ode.sample(field, n=1, nfe=2).x.shape == (1, 3, 16, 8)
    command = ["sample", "--model", str(path), "--n", "1", "--nfe", "2", "--out", str(tmp_path / "x.npz")]
    assert main([*command, "--model-options", '{"shape": [3, 16, 8]}']) == 0
    for name in ("channels_last", "compile"):
        assert main([*command, "--model-options", f'{{"{name}": "x"}}']) == 2
        assert f'wants true or false for {name}, but has "x"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("multipliers", "heads"), [((1, 2, 3, 4), "64 channels each"), ((1, 1, 2, 3, 4), "4"), ((1, 1, 2, 2, 4, 4), "64")]
)
def test_heads_are_taken_as_released(multipliers, heads, monkeypatch):
    """guided-diffusion's ImageNet networks, by the size of their images: 64, 128 and 256."""
    monkeypatch.setattr("ddim_ode.models.released.fit", lambda *_: None)
    with torch.device("meta"):  # shapes alone: they are too large to be made
        made = GuidedUNet(width=256, multipliers=multipliers, blocks=1, resample_blocks=True)
        network, description = build_released(made.state_dict(), "w.pt")
    assert f"attention heads ({heads}" in description["guessed"]
    channels = 256 * multipliers[-1]
    assert network.middle_block[1].heads == (4 if heads == "4" else channels // 64)


def test_what_weights_do_not_say_is_among_the_notes(tmp_path):
    network = GuidedUNet(width=32, multipliers=(1,), blocks=1, attention=(0,), heads=4)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    notes = " ".join(ddim_ode.load(tmp_path / "w.pt").notes)
    for part in ("their schedule", "what they predict", "attention heads (4 are taken), nor the order", "rescaled"):
        assert part in notes
    said = {"heads": 4, "new_order": False, "label_scale": 1.0}
    field = ddim_ode.load(tmp_path / "w.pt", network=said, schedule=NoiseSchedule.linear(), prediction="epsilon")
    assert len(field.notes) == 1  # whether they are an average


def test_a_pickle_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pkl"):
        with pytest.raises(ValueError, match="wants to run code"):
            ddim_ode.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
