"""diffusers' folders: the same numbers from the same weights, and every option read or reported."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_ode
from ddim_ode import Code, NoiseSchedule, encode
from ddim_ode.cli import main
from ddim_ode.data import as_tensor
from ddim_ode.metrics import mse
from ddim_ode.models import pipelines
from ddim_ode.models.pipelines import ModelWarning, classes_tensor, from_pipeline, read_scheduler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def randomised(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet(**options):
    return randomised(diffusers.UNet2DModel(**UNET, **options))


def save(folder, network, scheduler, flat=False):
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    if flat:  # as google/ddpm-cifar10-32 lies
        for part in ("unet", "scheduler"):
            for file in (folder / part).iterdir():
                file.rename(folder / file.name)
            (folder / part).rmdir()
    return folder


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelWarning)
        return ddim_ode.load(folder, **options)


def agrees(field, network, label, shape=(3, 16, 16), **given):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    sigma = float(field.schedule.sigma(label + 1.0))
    with torch.no_grad():
        wanted = network(x, torch.tensor([label, label]), **given).sample
    got = field(x * (1 + sigma**2) ** 0.5, sigma)
    torch.testing.assert_close(got, wanted[:, : shape[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("label", [0.0, 17.5, 999.0])
def test_an_unconditional_folder(tmp_path, flat, label):
    network = unet()
    field = load(save(tmp_path, network, diffusers.DDIMScheduler(clip_sample=False), flat))
    assert field.shape == (3, 16, 16)
    assert field.notes == ()
    agrees(field, network, label)


def test_a_bare_network(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path)
    with pytest.warns(ModelWarning, match="the paper's schedule is taken"):
        field = ddim_ode.load(tmp_path)
    agrees(field, network, 3.25)
    field = ddim_ode.load(tmp_path, schedule=NoiseSchedule.cosine(), prediction="v_prediction")
    assert (field.prediction, field.schedule.config["kind"]) == ("v_prediction", "cosine")


def test_texts_that_nobody_reads_are_refused(tmp_path):
    save(tmp_path / "plain", unet(), diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="no text encoder"):
        load(tmp_path / "plain", prompt="a cat")
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).save_pretrained(tmp_path / "text")  # fmt: skip
    with pytest.raises(ValueError, match="wants a text's embedding"):
        load(tmp_path / "text")


def test_a_class_conditional_network(tmp_path):
    network = unet(num_class_embeds=5)
    save(tmp_path, network, diffusers.DDIMScheduler(clip_sample=False))
    agrees(load(tmp_path, class_labels=3), network, 40.0, class_labels=torch.tensor([3, 3]))
    agrees(load(tmp_path, class_labels=[1, 4]), network, 40.0, class_labels=torch.tensor([1, 4]))
    for labels, says in ((None, "class-conditional: give class_labels="), (5, "from 0 to 4"), (0.5, "whole numbers")):
        with pytest.raises(ValueError, match=says):
            load(tmp_path, class_labels=labels)
    for labels in (True, [[1, 2]], [], "abc", [None], [[1], [2, 3]]):
        with pytest.raises(ValueError, match="class_labels must be whole numbers from 0 to 4"):
            classes_tensor(labels, 5, "cpu")
    with pytest.raises(ValueError, match="stands for none"):
        load(tmp_path, class_labels=1, guidance_scale=2.0)


@pytest.fixture
def dit(tmp_path):
    network = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )
    )  # fmt: skip
    vae = randomised(diffusers.AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))  # fmt: skip
    diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    return network, vae


def test_dit_with_its_codec_and_guidance(dit, tmp_path):
    network, vae = dit
    field = load(tmp_path, class_labels=[2, 7])
    labels = torch.tensor([2, 7])
    agrees(field, network, 12.0, (4, 8, 8), class_labels=labels)  # learned variance: the noise half
    guided = load(tmp_path, class_labels=[2, 7], guidance_scale=3.0)
    plain, none = field, load(tmp_path, class_labels=[10 - 1, 10 - 1])
    assert none.shape == (4, 8, 8)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        without = network(
            x / 2**0.5, torch.tensor([1.0, 1.0]) * field.schedule.label(1.0), class_labels=torch.tensor([10, 10])
        ).sample
    torch.testing.assert_close(
        guided(x, 1.0), without[:, :4] + 3.0 * (plain(x, 1.0) - without[:, :4]), rtol=1e-4, atol=1e-5
    )
    # The way to pictures and back is the pipeline's own.
    assert field.codec.shape == (3, 16, 16)
    latent = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = vae.decode(latent.float() / vae.config.scaling_factor).sample
    torch.testing.assert_close(field.codec.decode(latent), wanted)
    assert field.codec.encode(wanted).shape == (1, 4, 8, 8)
    # Latents decoded to pictures by another codec are other pictures, and a code says so.
    code = Code.of(field, encode(field, torch.randn(2, 4, 8, 8), nfe=2))
    other = load(tmp_path, class_labels=[2, 7])
    assert code.differences(other) == []
    other.codec = replace(other.codec, weights="another")
    assert [said[:8] for said in code.differences(other)] == ["codec is"]
    options = ["--model-options", '{"class_labels": 1}', "--n", "1", "--nfe", "2", "--out", str(tmp_path / "one.png")]
    assert main(["sample", "--model", str(tmp_path), *options]) == 0
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")


@pytest.mark.usefixtures("dit")
def test_dit_takes_squares_of_whole_patches(tmp_path):
    field = load(tmp_path, class_labels=1, shape=(4, 12, 12))
    assert field.codec.shape == (3, 24, 24)
    assert field(torch.zeros(1, 4, 12, 12), 1.0).shape == (1, 4, 12, 12)
    for shape, says in (((4, 9, 9), "multiples of 2"), ((4, 8, 12), "square images")):
        with pytest.raises(ValueError, match=says):
            load(tmp_path, class_labels=1, shape=shape)


@pytest.mark.usefixtures("dit")
def test_round_trips_of_latent_models_are_judged_on_pictures(tmp_path):
    field = load(tmp_path, class_labels=1)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "p.npy", pictures)
    model = ["--model", str(tmp_path), "--model-options", '{"class_labels": 1}', "--images", str(tmp_path / "p.npy")]
    out = tmp_path / "out"
    assert main(["reconstruct", *model, "--solvers", "default,ddim", "--nfe", "6", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    x = as_tensor(pictures)
    latent = field.codec.encode(x)
    trip = ddim_ode.round_trip(field, latent, nfe=6, solver="ddim", grid="quadratic")
    np.testing.assert_allclose(found["codec_mse"], mse(x, field.codec.decode(latent)), rtol=1e-5)
    lost = mse(field.codec.decode(latent), field.codec.decode(trip.reconstruction))
    rows = {row["solver"]: row for row in found["rows"]}
    np.testing.assert_allclose(rows["ddim"]["each"]["round_trip_mse"], lost, rtol=1e-4)
    assert rows["default"]["round_trip_mse"] < 1e-3 * rows["ddim"]["round_trip_mse"]
    options = ["--solvers", "ab2", "--nfe", "6", "--n", "2", "--reference-nfe", "30", "--grid", "linear"]
    assert main(["compare", *model, *options, "--out", str(out)]) == 0
    row = json.loads((out / "results.json").read_text())["rows"][0]
    trip = ddim_ode.round_trip(field, latent, nfe=6, solver="ab2", grid="linear")
    lost = mse(field.codec.decode(latent), field.codec.decode(trip.reconstruction))
    assert row["round_trip_mse"] == pytest.approx(float(lost.mean()), rel=1e-3)
    with Image.open(out / "samples.png") as picture:
        assert picture.mode.startswith("RGB")


def test_stable_diffusion_built_from_its_parts(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=64,
        bos_token_id=62, eos_token_id=63, pad_token_id=63, max_position_embeddings=8))  # fmt: skip
    # Letters and the two marks that CLIP's texts begin and end with.
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": 62, "<|endoftext|>": 63}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8
    )
    network = randomised(diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")))  # fmt: skip
    vae = randomised(diffusers.AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, network, scheduler, None, None, requires_safety_checker=False
    )
    folder = tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent"}
    wanted = pipeline("a b", negative_prompt="c", latents=latent, **given).images
    with pytest.warns(ModelWarning, match="set_alpha_to_one"):
        field = ddim_ode.load(folder, prompt="a b", negative_prompt="c", guidance_scale=4.0)
    assert (field.prediction, field.schedule.config["kind"]) == ("v_prediction", "scaled_linear")
    scheduler.set_timesteps(5)
    # Their last step stops at the first trained level, not at 0.
    nodes = field.schedule.sigma(np.append(scheduler.timesteps.numpy(), 0.0) + 1.0)
    run = ddim_ode.sample(field, latent, solver="ddim", grid=nodes)
    torch.testing.assert_close(run.x.float(), wanted, rtol=1e-4, atol=1e-4)
    assert field.codec.decode(run.x).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="needs prompt="):
        ddim_ode.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelWarning)
        same = from_pipeline(pipeline, prompt="a b", negative_prompt="c", guidance_scale=4.0)
    torch.testing.assert_close(same(latent, 1.0), field(latent, 1.0))
    assert not any(p.requires_grad for p in field.model.parameters())
    assert all(p.requires_grad for part in (network, vae) for p in part.parameters())
    network.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"expects an embedding of its guidance scale \(time_cond_proj_dim\)"):
        from_pipeline(pipeline, schedule=NoiseSchedule.linear(), prediction="epsilon", prompt="a")


def test_a_pipeline_in_memory_stays_its_callers(tmp_path):
    network = unet().train()
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDIMScheduler(clip_sample=False))
    field = from_pipeline(pipeline)
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.training for m in field.model.modules())
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path).model
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())


def test_the_shape_may_be_said(tmp_path):
    network = unet()
    network.register_to_config(sample_size=None)
    save(tmp_path, network, diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=r"does not say the size of its images .*: give shape=\(3, H, W\)"):
        load(tmp_path)
    field = load(tmp_path, shape=[3, 16, 8])
    assert field.shape == (3, 16, 8)
    agrees(field, network, 3.0, (3, 16, 8))
    config = tmp_path / "unet" / "config.json"
    for size in (15, 15.5, "x", [16, 15]):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        with pytest.raises(ValueError, match=r"multiples of 2, but the shape is|numbers must be a whole number"):
            load(tmp_path)
        assert load(tmp_path, shape=(3, 8, 8)).shape == (3, 8, 8)
    for shape, says in ((5, "must be"), ((3, 8), "must be"), ((1, 8, 8), "takes 3 channels"), ((3, 8, -8), "whole")):
        with pytest.raises(ValueError, match=says):
            load(tmp_path, shape=shape)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_ddim(tmp_path, spacing, offset, prediction):
    network = unet()
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction
    )
    field = load(save(tmp_path, network, scheduler))
    latent = ddim_ode.noise((3, 16, 16), 2, 0).float()
    scheduler.set_timesteps(10)
    x = latent.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    grid = "linear" if spacing == "trailing" else [*field.schedule.sigma(scheduler.timesteps.numpy() + 1.0), 0.0]
    run = ddim_ode.sample(field, latent, solver="ddim", grid=grid, steps=10, dtype=torch.float32)
    scale = float(x.abs().max())
    torch.testing.assert_close(run.x / scale, x / scale, rtol=0, atol=1e-4)


# -- the scheduler's configuration ----------------------------------------------------------------
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"])
def test_tables_are_the_schedulers(betas):
    options = {"trained_betas": np.linspace(1e-3, 0.3, 50).tolist()} if betas == "trained" else {"beta_schedule": betas}
    scheduler = diffusers.DDPMScheduler(**options, num_train_timesteps=50 if betas == "trained" else 1000)
    schedule, prediction, _ = read_scheduler(scheduler.config)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4)
    assert prediction == "epsilon"


def test_zero_terminal_snr_loses_its_last_step():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    schedule, prediction, notes = read_scheduler(scheduler.config)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod[:-1].double().numpy(), rtol=2e-3)
    assert (schedule.T, prediction) == (999, "v_prediction")
    assert "the last step is dropped" in notes[0]


def test_what_is_done_otherwise_is_said(tmp_path):
    scheduler = diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=2.0)
    save(tmp_path, unet(), scheduler)
    with pytest.warns(ModelWarning, match=r"clips the predicted image to ±2"):
        field = ddim_ode.load(tmp_path)
    assert len(field.notes) == 1
    _, _, notes = read_scheduler(
        {"_class_name": "DDIMScheduler", "use_karras_sigmas": True, "mystery": 3, "thresholding": True}
    )
    names = [n.split(":")[0] for n in notes]
    # What a folder leaves out is the class's default, and this class clips.
    assert names == ["clip_sample", "thresholding", "use_karras_sigmas", "unknown option mystery = 3"]
    _, _, notes = read_scheduler({"_class_name": "EulerDiscreteScheduler", "mystery": 0, "puzzle": False})
    assert notes == ["unknown option mystery = 0: not used"]
    options = {"final_sigmas_type": "sigma_min", "lambda_min_clipped": -5.1}
    _, _, notes = read_scheduler({"_class_name": "DPMSolverMultistepScheduler"} | options)
    assert [n.split(":")[0] for n in notes] == ["final_sigmas_type is sigma_min", "lambda_min_clipped"]
    assert "log sigma = 5.1" in notes[1]


@pytest.mark.parametrize("name", sorted(pipelines._BETAS))
def test_what_a_configuration_leaves_out_is_its_classs_default(name):
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    schedule, _, notes = read_scheduler({"_class_name": name})
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4)
    _, _, whole = read_scheduler({**scheduler.config, "_class_name": name})
    assert notes == whole
    assert any("clip_sample" in n for n in notes) == bool(scheduler.config.get("clip_sample"))
    assert any("set_alpha_to_one" in n for n in notes) == (name == "PNDMScheduler")


def test_defaults_without_diffusers_are_ddpms(monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(pipelines, "_diffusers", missing)
    schedule, prediction, notes = read_scheduler({"_class_name": "DDPMScheduler"})
    assert (schedule.config, prediction, len(notes)) == (NoiseSchedule.linear().config, "epsilon", 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "DDIMScheduler", "beta_start": None}, "beta_start must be a number, .* has None"),
        ({"_class_name": "DDIMScheduler", "beta_end": "x"}, "beta_end must be a number, .* has 'x'"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": None}, "clip_sample_range must be a number"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": "x"}, "num_train_timesteps must be a whole number"),
        ({"_class_name": "DDIMScheduler", "trained_betas": "x"}, "trained_betas must be a list of numbers"),
        (
            {"_class_name": "DDIMScheduler", "trained_betas": [0.1, None, "x"]},
            "trained_betas must be a list of numbers",
        ),
        ({"_class_name": ["DDIMScheduler"]}, "known are"),
        ({"_class_name": "LCMScheduler"}, "distilled|few jumps"),
        ({"_class_name": "VQDiffusionScheduler"}, "discrete"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "from_velocity"),
        ({"_class_name": "EDMEulerScheduler"}, "from_denoiser"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "from_score"),
        ({"_class_name": "MyScheduler"}, "known are"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction_type"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "beta_schedule = 'laplace'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "from_velocity"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "from_denoiser"),
    ],
)
def test_schedulers_without_this_ode_are_refused(config, says):
    with pytest.raises(ValueError, match=says):
        read_scheduler(config)


# -- bad folders ------------------------------------------------------------------------------------
def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model: it has no config\.json"):
        load(tmp_path)
    folder = save(tmp_path / "whole", unet(), diffusers.DDIMScheduler(clip_sample=False))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"unet is not a whole UNet2DModel"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"unet is not a whole UNet2DModel"):
        load(folder)
    weights.write_bytes(content)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_')
    with pytest.raises(ValueError, match="not whole JSON"):
        load(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, but holds a list"):
        load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps([index]))
    with pytest.raises(ValueError, match=r"model_index\.json must hold a JSON object, but holds a list"):
        load(folder)
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    with pytest.raises(ValueError, match="without unet or transformer"):
        load(folder)
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet3DModel"}')
    with pytest.raises(ValueError, match="holds a UNet3DModel, and known are"):
        load(folder / "unet")


def test_a_network_that_is_asked_about_an_image_beside_x_is_refused(tmp_path):
    diffusers.UNet2DModel(
        sample_size=8, in_channels=7, out_channels=3, block_out_channels=(32,), norm_num_groups=8,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"takes 7 channels and returns 3: .*inpainting; wrap it by hand"):
        load(tmp_path)


def test_a_bare_network_on_the_hub(tmp_path, monkeypatch):
    network = unet()
    network.save_pretrained(tmp_path)

    def none(*_, **__):
        raise OSError("somebody/network does not appear to have a file named model_index.json.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", none)
    monkeypatch.setattr(diffusers.UNet2DModel, "load_config", lambda *_, **__: dict(network.config))
    monkeypatch.setattr(diffusers.UNet2DModel, "from_pretrained", lambda *_, **__: network)
    with pytest.warns(ModelWarning, match="no scheduler beside the network"):
        field = ddim_ode.load("somebody/network")
    agrees(field, network, 40.0)


def test_a_name_on_the_hub_needs_a_network(monkeypatch):
    said = []

    def answer(text):
        def raises(*_, **__):
            said.append(text)
            raise OSError(text)

        return raises

    absent = "it does not appear to have a file named model_index.json."
    monkeypatch.setattr(diffusers.UNet2DModel, "load_config", answer("no config.json either"))
    for text, requests in (("no route to host", 1), (absent, 2)):
        monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", answer(text))
        said.clear()
        with pytest.raises(OSError, match=rf"no folder here, and the hub did not give it \({text}\)"):
            ddim_ode.load("google/ddpm-cifar10-32")
        assert len(said) == requests
