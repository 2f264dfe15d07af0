"""What holds on a CPU holds on a GPU: a resumed training equals an uninterrupted one, and motion
and frames are the CPU's up to rounding.

    python -m pytest -q tests/test_gpu.py        alone, for all other tests run on the CPU
"""
import shutil

import numpy as np
import pytest
import torch

import build
import sample
import train
from moda import M, generate, read_checkpoint
from renderer import LivePortrait

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is seen")
GPU = torch.device("cuda")
TRAININGS = {
    "float32": [],
    "bfloat16": ["--bf16"],
    "checkpointing": ["--bf16", "--checkpointing"],
    "compiled": ["--bf16", "--compile"],
    "expert": ["--model=alse"]}


@pytest.fixture(autouse=True)
def as_before():
    """What a training sets."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


def train_on_gpu(out, *flags):
    train.main(["--clips=4", "--eval_clips=0", "--steps=8", "--keep_every=4", "--batch_size=4",
                "--device=cuda", f"--out_dir={out}", *flags])
    state = read_checkpoint(out / "ckpt.pt")
    return torch.utils._pytree.tree_leaves([state["model"], state["optimizer"]])


@pytest.mark.parametrize("flags", TRAININGS.values(), ids=TRAININGS)
def test_a_resumed_training_equals_an_uninterrupted_one(flags, tmp_path):
    whole = train_on_gpu(tmp_path / "whole", *flags)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/ckpt-4.pt", resumed / "ckpt.pt")
    for x, y in zip(whole, train_on_gpu(resumed, "--init_from=resume", *flags), strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_motion_is_that_of_the_cpu():
    """Of a voice of several windows, in float32 and, further off, in bfloat16."""
    model = build.model(chunk=40)
    voice = torch.randn(80, 1, 160), torch.randn(63), torch.randn(M), 3
    options = dict(steps=3, guidance={"audio": 0.5}, chunk=30, overlap=8, past=2)
    truth = generate(model, *voice, **options)
    model.to(GPU)
    assert torch.allclose(generate(model, *voice, **options), truth, atol=1e-3)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    error = (generate(model, *voice, **options) - truth).square().mean().sqrt()
    assert error < 0.05 * truth.std()


def test_frames_are_those_of_the_cpu(tmp_path):
    """Of the second batch too."""
    weights = build.liveportrait(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    faces = LivePortrait(weights), LivePortrait(weights, GPU), \
        LivePortrait(weights, GPU, torch.bfloat16)
    frames = []
    for face in faces:
        source = face.source(picture)
        motion = source.motion + 0.01 * torch.arange(9)[:, None]
        frames.append([*face.frames(source, motion)])
    for k in 0, 8:
        truth, ours, half = [np.float32(frame[k]) for frame in frames]
        assert np.abs(ours - truth).max() <= 6, k              # convolutions take TF32
        assert np.abs(half - truth).mean() < 0.1 * truth.std(), k


def test_a_video_is_made_on_a_gpu(tmp_path):
    build.video(tmp_path / "voice.mp4")
    model = build.model()
    statistics = dict(mean=torch.ones(M), std=torch.full([M], 0.01))
    torch.save(dict(kind="MoDA", config=vars(model.cfg), model=model.state_dict() | statistics),
               tmp_path / "ckpt.pt")
    for flags in [], ["--bf16"], ["--stream", "--emotion=fear:1,anger"]:
        video = tmp_path / f"{len(flags)}.mp4"
        sample.main([f"--ckpt={tmp_path}/ckpt.pt", f"--audio_path={tmp_path}/voice.mp4",
                     "--device=cuda", f"--output_path={video}", *flags])
        assert video.stat().st_size
