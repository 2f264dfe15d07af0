"""What the tests of bad inputs share: a folder in which every command works, a copy of it to spoil,
and the promise.

A mistake costs one line on stderr that says what and where, exit code 1, or 2 for a flag, and no
file: nothing is lost, nothing is half written under a final name. A test file imports the fixtures
that its tests use, and those that these use."""
import json
import os
import re
import shutil
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import build
import data
import sample
import train
from data import save
from forks import Script
from moda import ALSE, PRESETS, Config

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests/tools"))
import check

SCRIPTS = dict(sample=sample, portrait=sample, play=sample, pairs=sample, train=train, resume=train,
               prepare=data, check=check)
# flags that work in the folder `good`; what a test adds comes last and counts
FLAGS = dict(
    sample="--audio_path=voice.wav --ckpt=ckpt.pt --output_path=video.mp4 --steps=1 --chunk=20 "
           "--overlap=4",
    portrait="--audio_path=voice.wav --ckpt=ckpt.pt --image_path=me.png --weights=.",
    play="--audio_path=voice.wav --ckpt=ckpt.pt --output_path=video.mp4",
    pairs="--ckpt=ckpt.pt --steps=1 --chunk=20 --overlap=4",
    train="--data_dir=set --out_dir=new_run --width=32 --steps=20 --batch_size=2",
    resume="--data_dir=set --out_dir=old --init_from=resume --width=32 --heads=2 --n_one=2 "
           "--steps=2",
    prepare="--videos=videos --data_dir=new --weights=lp",
    check="--data_dir=set --report=")
# what a run may begin before it fails
BEGUN = {"new_run/log.csv", "new/manifest.json"}


# -------------------------------------------------------------------------- a folder, and its copy
@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny):
    """A folder in which every command works, with videos and checkpoints not to be harmed."""
    folder = tmp_path_factory.mktemp("good")
    noise = np.random.default_rng(0).normal(0, 0.1, 3000)
    soundfile.write(folder / "voice.wav", noise, 16000)
    Image.new("RGB", (64, 48), "tan").save(folder / "me.png")
    write_checkpoints(folder, tiny)
    build.data_set(folder / "set", lengths=(90, 100))
    for name in ("video.mp4", "old/sample.mp4", "videos/talk.mp4", "text.txt"):
        write(folder / name, "the last video")
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of the good folder to work in and to spoil."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_checkpoints(folder, tiny):
    """A MoDA of a training that may go on, and an expert."""
    model = tiny.state_dict()
    model["mean"] = model["std"] = torch.full((70,), 0.1)
    optimizer = torch.optim.Adam(tiny.parameters()).state_dict()
    config = asdict(Config(**PRESETS["toy"] | build.SMALL))            # as train.py would make it
    about = dict(kind="MoDA", config=config, settings={}, step=1, best=9.0, model=model,
                 optimizer=optimizer)
    save(folder / "ckpt.pt", about)
    save(folder / "old/ckpt.pt", about)
    expert = ALSE(Config(width=32, audio_layers=1, audio_dim=160))
    about = dict(kind="ALSE", config=asdict(expert.cfg), model=expert.state_dict())
    save(folder / "expert.pt", about)


@pytest.fixture
def preparable(folder, monkeypatch):
    """The same, where `prepare` needs no weights and every video becomes a clip of 90 frames."""
    def extract(*args):
        n = 90
        return dict(motion=[torch.zeros(n, 70)], audio=[torch.zeros(n, 1, 160).half()],
                    identity=[torch.zeros(63)], loudness=[torch.zeros(n)])
    monkeypatch.setattr(data, "LivePortrait", lambda *args: None)
    monkeypatch.setattr(data, "extract", extract)


# ------------------------------------------------------------------------------- to spoil its files
class Code:
    """A pickle that would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def write(name, content):
    """A file that holds text, bytes, or what torch.save makes of anything else."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


def cut(name, n):
    """Keep the first n bytes of a file."""
    write(name, Path(name).read_bytes()[:n])


def change_checkpoint(**values):
    """Set entries of ckpt.pt."""
    state = torch.load("ckpt.pt", weights_only=True)
    write("ckpt.pt", state | values)


def change_config(**values):
    """Set fields of the Config in ckpt.pt."""
    config = torch.load("ckpt.pt", weights_only=True)["config"]
    change_checkpoint(config=config | values)


def change_weights(**tensors):
    """Set tensors of the network in ckpt.pt."""
    model = torch.load("ckpt.pt", weights_only=True)["model"]
    change_checkpoint(model=model | tensors)


def change_manifest(**values):
    """Set entries of the data set's manifest."""
    path = Path("set/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | values))


# ----------------------------------------------------------------------------- to run a command
def contents():
    """Every file below the current folder by name, but what a run may begin before it fails."""
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files if str(path) not in BEGUN}


def reported(stderr):
    """The lines on stderr without progress bars."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d\d:\d\d[<,]", line)]


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """run("sample --steps=3"): a command with more flags -> its exit code, the lines on stderr."""
    monkeypatch.setattr(os, "_exit", sys.exit)

    def run(command):
        name, *flags = command.split(" ")
        script = SCRIPTS[name]
        monkeypatch.setattr(sys, "argv", [script.__name__, *FLAGS[name].split(), *flags])
        stdout, code = sys.stdout, 0
        try:
            data.run(script.main)
        except SystemExit as ended:
            code = ended.code
        sys.stdout = stdout                        # which a command that fails takes away
        return code, reported(capfd.readouterr().err)
    return run


@pytest.fixture
def refused(run):
    """refused("sample --steps=-3", "steps=-3"): the command fails as promised, with those words."""
    def refused(command, *words, code=1):
        before = contents()
        ended, lines = run(command)
        errors = [line for line in lines if not line.startswith("passed over: ")]
        assert ended == code and len(errors) == 1, lines
        assert errors[0].startswith("error: "), lines
        for word in words:
            assert word in errors[0]
        assert contents() == before
        assert not Path("run_by_a_pickle").exists()
        return lines
    return refused


def start(folder, script, *flags, stdout=None, largest=resource.RLIM_INFINITY, env=None):
    """A command in a process group of its own, as a terminal starts it: its stdin is open."""
    stdin, typed = os.pipe()
    errors, stderr = os.pipe()
    process = Script(script, *flags, cwd=folder, env=env, stdin=stdin, stdout=stdout,
                     stderr=stderr, largest=largest)
    os.close(stdin)
    os.close(stderr)
    process.stdin, process.stderr = open(typed, "w"), open(errors)
    return process
