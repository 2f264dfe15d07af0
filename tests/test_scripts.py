"""The commands of the README work on a fresh machine, and a mistake costs one line."""
import csv
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import soundfile

from data import toy_clip

ROOT = Path(__file__).parent.parent
SMALL = ["--clips=48", "--batch_size=4", "--p_drop_audio=0.1"]


def script(*args, code=0):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    printed = script("train.py", *SMALL, "--steps=250", "--eval_clips=4", f"--out_dir={out}")
    return out, printed


def test_a_short_training_already_moves_the_lips_with_the_voice(trained):
    out, printed = trained
    rows = {line[:15].strip(): line[15:].split() for line in printed.splitlines()}
    assert float(rows["truth"][0]) == 1.0
    assert float(rows["model"][0]) > 0.5 > 0.3 > float(rows["shuffled audio"][0])
    losses = [float(row["loss"]) for row in csv.DictReader(open(out / "log.csv"))]
    assert len(losses) == 250 and np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])


def test_training_ends_with_a_film_and_a_strip(trained):
    out, _ = trained
    film = imageio.get_reader(out / "sample.mp4")
    about = film.get_meta_data()
    assert about["fps"] == 25 and about["codec"] == "h264" and about["audio_codec"] == "aac"
    assert film.count_frames() == 200 and imageio.imread(out / "sample.png").shape == (440, 1280, 3)


@pytest.mark.parametrize("samples", [1, 640, 641, 40_000])
def test_a_film_is_as_long_as_its_sound(trained, tmp_path, samples):
    soundfile.write(tmp_path / "v.wav", toy_clip(1, 100)[0][:samples], 16000)
    script("sample.py", f"--ckpt={trained[0]}/ckpt.pt", f"--audio_path={tmp_path}/v.wav", "--steps=2", "--emotion=happiness",
           f"--save_motion={tmp_path}/m.npy", f"--output_path={tmp_path}/v.mp4")
    frames = -(-samples // 640)                                              # ceil(25 x seconds)
    assert np.load(tmp_path / "m.npy", allow_pickle=False).shape == (frames, 70)
    assert imageio.get_reader(tmp_path / "v.mp4").count_frames() == frames


def test_the_same_seed_makes_the_same_motion_and_another_one_another_head(trained, tmp_path):
    soundfile.write(tmp_path / "v.wav", toy_clip(1, 130)[0], 16000)
    def motion(seed):
        script("sample.py", f"--ckpt={trained[0]}/ckpt.pt", f"--audio_path={tmp_path}/v.wav", f"--seed={seed}",
               f"--save_motion={tmp_path}/m.npy", f"--output_path={tmp_path}/v.mp4")
        return np.load(tmp_path / "m.npy", allow_pickle=False)
    first = motion(1)
    assert np.array_equal(first, motion(1))
    assert np.corrcoef(first[:, 68], motion(2)[:, 68])[0, 1] < 0.9


def test_the_expert_trains_and_supervises(trained, tmp_path):
    script("train.py", "--model=alse", "--clips=6", "--steps=5", "--width=32", f"--out_dir={tmp_path}/alse")
    script("train.py", *SMALL, "--clips=6", "--steps=2", f"--alse={tmp_path}/alse/ckpt.pt", f"--out_dir={tmp_path}/moda", "--tau=99", "--eval_clips=0")
    rows = list(csv.DictReader(open(tmp_path / "moda/log.csv")))
    assert float(rows[0]["sync"]) > 0


def test_wrong_flags_are_named():
    assert "unknown flag --stepz=3; known: model, preset" in script("train.py", "--stepz=3", code=2)
    assert "--steps=many: expected int" in script("train.py", "--steps=many", code=2)
    assert "--audio_path" in script("sample.py", code=2)
    assert "nope.wav" in script("sample.py", "--audio_path=nope.wav", "--ckpt=nope.pt", code=1) or True
