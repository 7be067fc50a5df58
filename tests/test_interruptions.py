"""Training that is killed, stopped and shared out: the weights of the run that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

STEPS = 60
COMMON = [
    "train", "--width", "8", "--groups", "4", "--multipliers", "1,2", "--attention", "4", "--batch-size", "8", "--save-every",
    "7", "--no-autocast", "--rank", "6", "--steps", str(STEPS), "--dropout", "0.1", "--flip", "--warmup", "5",
]  # fmt: skip
# Slow enough to be hit anywhere, and it shows how far it is.
SLOWLY = """
import sys, time
from ddim_ode import cli, training
inner = training._batch
def slowly(*arguments):
    time.sleep(0.02)
    return inner(*arguments)
training._batch = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def images(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8))
    return str(tmp_path / "images.npy")


def command(images, out):
    return [sys.executable, "-c", SLOWLY, *COMMON, "--data", images, "--out", str(out)]


def state(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved["step"], torch.cat([x.flatten().double() for x in saved["average"].values()])


def rows(out):
    return [line.split(",")[:3] for line in (out / "log.csv").read_text("utf-8").splitlines()]


def once(images, out):
    subprocess.run(command(images, out), check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def interrupted(images, out, number, times, seed):
    """Run until done, interrupted `times` times on the way at moments drawn at random."""
    draw, left = random.Random(seed), times
    for _ in range(60):
        run = subprocess.Popen(
            command(images, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if left:
            # From before the first checkpoint of this stretch to well after some.
            began, before = (
                time.monotonic(),
                (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0,
            )
            wait = draw.uniform(0.0, 0.3)
            while time.monotonic() - began < 60 and run.poll() is None:
                path = out / "checkpoint.pt"
                if draw.random() < 0.02 or (path.exists() and path.stat().st_mtime_ns != before):
                    break
                time.sleep(0.02)
            time.sleep(wait)
            if run.poll() is None:
                run.send_signal(number)
                left -= 1
        error = run.communicate(timeout=120)[1].decode()
        assert run.returncode in (0, -number, 128 + number), error
        if run.returncode == 0:
            break
        if (out / "checkpoint.pt").exists():
            state(out)  # whole, whenever it was hit
    return times - left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_ten_interruptions_change_nothing(tmp_path, images, number):
    once(images, tmp_path / "whole")
    hits = interrupted(images, tmp_path / "parts", number, 10, seed=int(number))
    assert hits >= 5  # the last ones may find the run finished
    step, weights = state(tmp_path / "parts")
    assert step == STEPS
    torch.testing.assert_close(weights, state(tmp_path / "whole")[1], rtol=0, atol=0)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob(".*"))


def test_sigterm_saves_at_once_and_says_so(tmp_path, images):
    out = tmp_path / "t"
    run = subprocess.Popen(
        command(images, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not (out / "checkpoint.pt").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGTERM)  # as a launcher does that passes on what the terminal has sent already
    error = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 143
    step, _ = state(out)
    assert 7 <= step < STEPS
    assert f"stopped at step {step}; the same command goes on from there" in error
    once(images, out)
    once(images, tmp_path / "whole")
    torch.testing.assert_close(state(out)[1], state(tmp_path / "whole")[1], rtol=0, atol=0)
    assert rows(out) == rows(tmp_path / "whole")


def test_two_processes_are_one(tmp_path, images):
    """torchrun: each takes half of every batch. Dropout draws differ by process, so there is none here."""
    drop = COMMON.index("--dropout")
    plain = [*COMMON[:drop], *COMMON[drop + 2 :], "--data", images, "--steps", "8"]
    for out, launcher in (
        ("one", [sys.executable, "-m", "ddim_ode"]),
        (
            "two",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddim_ode"],
        ),
    ):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*launcher, *plain, "--out", str(tmp_path / out)], check=True, capture_output=True, env=environment
        )
    torch.testing.assert_close(state(tmp_path / "two")[1], state(tmp_path / "one")[1], rtol=1e-4, atol=1e-5)
    one, two = (np.array(rows(tmp_path / out)[1:], dtype=float) for out in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert (tmp_path / "two" / "model.safetensors").exists()
