"""A bad file of weights, statistics or an audio encoder is one line that names it and says what to
do; no code in it runs."""
import math
import shutil
from pathlib import Path

import pytest
import torch

import moda
from bad import (Code, change_checkpoint, change_config, change_weights, cut, folder, good, refused,
                 run, write)

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = torch.full((70,), math.nan)
UNREADABLE = "ckpt.pt: not a readable checkpoint"
UNKNOWN = "ckpt.pt: not a MoDA that this version knows"


# ------------------------------------------------------------------------- no checkpoint at all
def test_no_checkpoint(refused):
    reason = "nowhere.pt: not a readable checkpoint (FileNotFoundError)"
    refused("sample --ckpt=nowhere.pt", reason, "train it first")


def test_a_folder_as_checkpoint(refused):
    refused("sample --ckpt=videos", "videos: not a readable checkpoint")


@pytest.mark.parametrize("content", ["", "<html>", torch.zeros(3)], ids=["empty", "web", "tensor"])
def test_a_file_that_is_no_checkpoint(refused, content):
    write("ckpt.pt", content)
    refused("sample", UNREADABLE, "fetch it again")


def test_a_checkpoint_cut_short(refused):
    cut("ckpt.pt", 9999)
    refused("sample", UNREADABLE)


def test_a_checkpoint_that_would_run_code(refused):
    change_weights(mean=Code())
    refused("sample", UNREADABLE)


# ----------------------------------------------------------------------- another model's checkpoint
def test_a_checkpoint_of_nothing(refused):
    write("ckpt.pt", {})
    refused("sample", UNKNOWN, "(it holds nothing)")


def test_the_expert_for_the_generator(refused):
    words = "expert.pt: not a MoDA that this version knows; get or retrain it (it holds ALSE)"
    refused("sample --ckpt=expert.pt", words)


def test_the_generator_for_the_expert(refused):
    words = "ckpt.pt: not a ALSE that this version knows; get or retrain it (it holds MoDA)"
    refused("train --alse=ckpt.pt", words)


def test_a_checkpoint_of_an_earlier_version(refused):
    change_config(fusion="c2f")
    refused("sample", UNKNOWN, "fusion", "retrain it")


@pytest.mark.parametrize("name, value", [
    ("depth", 9),                                  # a setting of a later version
    ("n_one", ""),
    ("heads", 0),
    ("heads", 5),
    ("width", 64),
    ("n_one", 1)])
def test_settings_that_do_not_fit_the_network(refused, name, value):
    change_config(**{name: value})
    refused("sample", UNKNOWN)


def test_a_checkpoint_without_settings(refused):
    write("ckpt.pt", {"kind": "MoDA"})
    refused("sample", UNKNOWN, "('config')")


@pytest.mark.parametrize("model", [None, 3])
def test_a_checkpoint_without_a_network(refused, model):
    change_checkpoint(model=model)
    refused("sample", UNKNOWN)


# ------------------------------------------------------------------------------------ its tensors
@pytest.mark.parametrize("tensors, words", [
    ({"std": NAN}, "std is of shape [70], should be of shape [70] and finite"),
    ({"std": torch.ones(71)}, "std is of shape [71], should be of shape [70] and finite"),
    ({"spare": torch.zeros(1)}, "spare is of shape []"),
    ({"epoch": 3}, "epoch is 3, should be absent"),
    ({"head.linear.bias": [0.0] * 70}, "head.linear.bias is [0.0, 0.0, ")])
def test_a_tensor_that_does_not_fit_is_named(refused, tensors, words):
    change_weights(**tensors)
    refused("sample", UNKNOWN, words)


def test_a_tensor_that_is_missing_is_named(refused):
    model = torch.load("ckpt.pt", weights_only=True)["model"]
    del model["null_audio"]
    change_checkpoint(model=model)
    refused("sample", UNKNOWN, "null_audio is absent")


def test_half_of_the_released_file(refused, monkeypatch):
    monkeypatch.setattr(moda, "RELEASED_CONFIG", dict(width=32, heads=1))      # seconds less
    write("ckpt.pt", {"motion_embedder.mlp.0.weight": NAN})
    refused("sample", UNKNOWN, "motion_embedder.mlp.0.weight is of shape [70]")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_in_another_precision_work(run, dtype):
    model = torch.load("ckpt.pt", weights_only=True)["model"]
    change_weights(**{name: x.to(dtype) for name, x in model.items()})
    assert run("sample") == (0, [])


# -------------------------------------------------------------------------------------- statistics
def test_no_statistics(refused):
    change_weights(std=torch.ones(70))
    refused("sample --stats=no.pt", "no.pt: not a readable checkpoint", "src/datasets/mean.pt")


def test_a_training_that_begins_from_weights_without_statistics(refused):
    """The data's own do not fit them."""
    change_weights(std=torch.ones(70))
    words = "mean.pt: not a readable checkpoint", "src/datasets/mean.pt"
    refused("train --init_from=ckpt.pt --heads=2 --n_one=2", *words)


def test_statistics_without_a_std(refused):
    write("s.pt", {"mean": torch.zeros(70)})
    refused("train --stats=s.pt", "s.pt: no mean and std of motion", "(std is absent")


# ---------------------------------------------------------------------------- where training starts
@pytest.mark.parametrize("flag", ["--alse", "--init_from"])
def test_no_checkpoint_to_train_with(refused, flag):
    reason = "nowhere.pt: not a readable checkpoint (FileNotFoundError)"
    refused(f"train {flag}=nowhere.pt", reason)


def test_nothing_to_resume(refused):
    words = "nowhere/ckpt.pt: not a readable checkpoint"
    refused("resume --out_dir=nowhere", words, "nothing to resume")


def test_the_run_of_another_network_to_resume(refused):
    refused("resume --width=64", "not a MoDA that this version knows", "is of shape")


def test_the_run_of_an_expert_to_resume(refused):
    shutil.copy("expert.pt", "old/ckpt.pt")
    refused("resume", "not a MoDA that this version knows", "it holds ALSE")


def test_a_run_to_resume_without_its_optimizer(refused):
    state = torch.load("old/ckpt.pt", weights_only=True)
    del state["optimizer"]
    write("old/ckpt.pt", state)
    refused("resume", "ckpt.pt: was trained with other settings")


def test_a_student_in_the_folder_of_its_teacher(refused):
    """--init_from=auto would take the teacher for the student's own run, and overwrite it."""
    state = torch.load("old/ckpt.pt", weights_only=True)
    write("old/ckpt.pt", state | dict(settings=dict(reflow="")))
    words = "was trained with other settings; use another --out_dir (--reflow differs)"
    refused("train --out_dir=old --reflow=old/ckpt.pt --init_from=auto --ema=0", words)


def test_a_teacher_that_is_not_there(refused):
    refused("train --reflow=nowhere.pt --out_dir=new", "nowhere.pt: not a readable checkpoint")
    assert not Path("new").exists()


# -------------------------------------------------------------------------------- the audio encoder
def test_no_audio_encoder(refused):
    words = "nowhere: not a base-size wav2vec 2.0 or HuBERT", "get facebook/wav2vec2-base"
    refused("sample --audio_encoder=nowhere", *words, "FileNotFoundError")


def test_an_empty_folder_as_encoder(refused):
    words = "videos/pytorch_model.bin: not a base-size wav2vec 2.0 or HuBERT"
    refused("sample --audio_encoder=videos", words, "FileNotFoundError")


def test_an_encoder_without_tensors(refused):
    write("encoder/pytorch_model.bin", {})
    words = "encoder/pytorch_model.bin: not a base-size wav2vec 2.0 or HuBERT, or incomplete"
    refused("sample --audio_encoder=encoder", words)
