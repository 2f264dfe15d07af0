"""Whatever a user does wrong costs one line that says what and where, exit code 1 (2 for a flag), and no file: nothing
is lost, nothing is half written under a final name. What is merely odd works."""
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import data
import sample
import train
from moda import ALSE, Config, save

pytestmark = pytest.mark.usefixtures("one_thread")          # the other core trains the toy meanwhile
ROOT = Path(__file__).parent.parent
# the commands that work in the folder `good`; what a row adds comes last and counts
DOORS = {
    "sample": (sample, "--audio_path=voice.wav --ckpt=ckpt.pt --output_path=film.mp4 --steps=1 --chunk=20 --overlap=4"),
    "portrait": (sample, "--audio_path=voice.wav --ckpt=ckpt.pt --image_path=me.png --weights=."),
    "train": (train, "--data_dir=set --out_dir=old --width=32 --heads=1 --steps=1 --batch_size=2 --eval_clips=0"),
    "resume": (train, "--data_dir=set --out_dir=old --init_from=resume --width=32 --heads=2 --n_one=2 --steps=2"),
    "prepare": (data, "--videos=videos --data_dir=new --weights=lp"),
    "check": (data, "--data_dir=set --check")}


class Code:
    """A pickle that would make a folder."""
    def __reduce__(self):
        return os.mkdir, ("run_by_a_pickle",)


def write(name, content):
    """A file that holds text, bytes, or what torch.save makes of anything else, in place of what was there."""
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).unlink(missing_ok=True)
    if isinstance(content, (str, bytes)):
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        torch.save(content, name)


def cut(name, n):
    write(name, Path(name).read_bytes()[:n])


def change(name, **changes):
    """New values in a file of torch.save, from functions of the old values."""
    state = torch.load(name, weights_only=True)
    write(name, state | {key: f(state.get(key)) for key, f in changes.items()})


def weights(edit):
    """Edit the network in ckpt.pt."""
    change("ckpt.pt", model=lambda model: model | edit(model))


def clip(k=1, **changes):
    """New tensors in a clip of the data set, from functions of the old ones."""
    tensors = {key: x.clone() for key, x in data.read_safetensors(f"set/clips/{k}.safetensors").items()}
    data.write_safetensors(tensors | {key: f(tensors[key]) for key, f in changes.items()},
                           f"set/clips/{k}.safetensors")


def manifest(**changes):
    path = Path("set/manifest.json")
    data.write_manifest(json.loads(path.read_text()) | changes, path)


def rows(edit):
    manifest(clips=[edit(row) for row in json.loads(Path("set/manifest.json").read_text())["clips"]])


def sound(samples, rate=16000, name="voice.wav", **options):
    soundfile.write(name, samples, rate, **options)


def ffmpeg(*args):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *args], check=True)


def encode(name, n):
    """The first n bytes of the voice in another format."""
    ffmpeg("-i", "voice.wav", name)
    cut(name, n)


def encoder(**config):
    """A folder like that of wav2vec 2.0, with a network that is too small for its name."""
    for name, text in config.items():
        write(f"ears/{name}.json", text)
    write("ears/pytorch_model.bin", {})


def safetensors(header):
    text = json.dumps(header).encode()
    write("ears/model.safetensors", struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny):
    """A folder in which every command works, and whose films and checkpoints are not to be harmed."""
    folder = tmp_path_factory.mktemp("good")
    soundfile.write(folder / "voice.wav", np.random.default_rng(0).normal(0, 0.1, 3000), 16000)
    model = tiny.state_dict() | {"mean": torch.full((70,), 0.1), "std": torch.full((70,), 0.1)}
    optimizer = torch.optim.Adam(tiny.parameters()).state_dict()
    about = dict(kind="MoDA", config=asdict(tiny.cfg), step=1, model=model, optimizer=optimizer)
    expert = ALSE(Config(width=32, audio_layers=1, audio_dim=160))
    for name in ("ckpt.pt", "old/ckpt.pt"):
        save(folder / name, about)
    save(folder / "expert.pt", dict(kind="ALSE", config=asdict(expert.cfg), model=expert.state_dict()))
    Image.new("RGB", (64, 48), "tan").save(folder / "me.png")
    clips = [dict(motion=torch.randn(n, 70), audio=torch.zeros(n, 1, 160).half(), identity=torch.zeros(63),
                  loudness=torch.zeros(n), emotion=torch.tensor(8)) for n in (90, 100)]
    for k, tensors in enumerate(clips):
        save(folder / f"set/clips/{k}.safetensors", tensors, write=data.write_safetensors)
    listed = [dict(file=f"clips/{k}.safetensors", emotion=8, split="train") for k in range(2)]
    data.write_manifest(dict(clips=listed, moments=[[1] * 70] * 2), folder / "set/manifest.json")
    (folder / "videos").mkdir()
    for name in ("film.mp4", "old/sample.mp4", "videos/talk.mp4", "text.txt"):
        (folder / name).write_text("the last film")
    return folder


def contents():
    """Every file below the current folder, except those that a run may begin before it fails: a log, settings, and
    what is not yet under its final name."""
    may_begin = {"old/log.csv", "new/manifest.json", "old/ckpt.pt.tmp"}
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and str(path) not in may_begin}


def told(stderr):
    """The lines on stderr without progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not re.search(r"\d\d:\d\d[<,]", line)]


def go(door, *flags, monkeypatch, capfd):
    """Run a command of DOORS with more flags -> its exit code, and what it says."""
    script, usual = DOORS[door]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *usual.split(), *flags])
    code = 0
    try:
        data.run(script.main)
    except SystemExit as ended:
        code = ended.code
    return code, capfd.readouterr()


nan = torch.tensor(math.nan)
BAD = {
    # sound
    "no voice": (None, "sample --audio_path=nowhere.wav", "nowhere.wav: no sound"),
    "an empty sound": (lambda: write("voice.wav", ""), "sample", "voice.wav: no sound"),
    "a sound of zero samples": (lambda: sound([]), "sample", "voice.wav: no sound"),
    "a header without a sound": (lambda: cut("voice.wav", 20), "sample", "voice.wav: no sound"),
    "a text as sound": (None, "sample --audio_path=text.txt", "text.txt: no sound"),
    "a picture as sound": (None, "sample --audio_path=me.png", "me.png: no sound"),
    "a folder as sound": (None, "sample --audio_path=videos", "videos: no sound"),
    "a device as sound": (None, "sample --audio_path=/dev/null", "/dev/null: no sound"),
    "a link to itself": (lambda: Path("x.wav").symlink_to("x.wav"), "sample --audio_path=x.wav", "x.wav: no sound"),
    "a name of two lines": (None, "sample --audio_path=two\nlines.wav", "lines.wav: no sound"),
    "NaN in the sound": (lambda: sound([0, math.nan] * 700, subtype="FLOAT"), "sample", "voice.wav: the sound"),
    "infinity in the sound": (lambda: sound([0, math.inf] * 700, subtype="FLOAT"), "sample", "voice.wav: the sound"),
    "an mp3 cut to its header": (lambda: encode("v.mp3", 150), "sample --audio_path=v.mp3", "v.mp3: no sound"),
    "an m4a cut before its index": (lambda: encode("v.m4a", 900), "sample --audio_path=v.m4a", "v.m4a: no sound"),
    "an ogg cut in its header": (lambda: encode("v.ogg", 200), "sample --audio_path=v.ogg", "v.ogg: no sound"),
    "a film without sound": (lambda: ffmpeg("-loop", "1", "-t", "0.1", "-i", "me.png", "mute.mp4"),
                             "sample --audio_path=mute.mp4", "mute.mp4: no sound"),
    "a sound of three samples per three seconds": (lambda: sound([0.1, 0, 0.1], 1), "sample", "voice.wav: no sound"),
    # pictures and crops
    "no picture": (None, "portrait --image_path=nobody.jpg", "nobody.jpg: no picture"),
    "an empty picture": (lambda: write("me.png", ""), "portrait", "me.png: no picture"),
    "a text as picture": (None, "portrait --image_path=text.txt", "text.txt: no picture"),
    "a folder as picture": (None, "portrait --image_path=videos", "videos: no picture"),
    "a picture cut short": (lambda: cut("me.png", 90), "portrait", "me.png: no picture"),
    "a picture that is a bomb": (lambda: Image.new("1", (20000, 20000)).save("me.png"), "portrait", "me.png: no"),
    "a picture of one pixel": (lambda: Image.new("RGB", (1, 1)).save("me.png"), "portrait", "1 x 1 pixels"),
    "a crop outside": (None, "portrait --crop=40,0,30", "crop 40,0,30"),
    "a negative crop": (None, "portrait --crop=-1,0,30", "crop -1,0,30"),
    "a crop of words": (None, "portrait --crop=left,top,30", "crop left,top,30"),
    "a crop too small": (None, "portrait --crop=0,0,15", "crop 0,0,15"),
    "a crop of two numbers": (None, "portrait --crop=0,30", "crop 0,30"),
    "no folder of LivePortrait": (None, "portrait", "appearance_feature_extractor.pth: not"),
    "a file for LivePortrait's folder": (None, "portrait --weights=text.txt", "text.txt"),
    "another animal's weights": (None, "portrait --weights=liveportrait_animals", "animals only"),
    # weights
    "no checkpoint": (None, "sample --ckpt=nowhere.pt", "nowhere.pt: not a readable checkpoint ([Errno 2] No such file"),
    "a folder as checkpoint": (None, "sample --ckpt=videos", "videos: not a readable checkpoint"),
    "an empty checkpoint": (lambda: write("ckpt.pt", ""), "sample", "ckpt.pt: not a readable checkpoint"),
    "a checkpoint cut short": (lambda: cut("ckpt.pt", 9999), "sample", "ckpt.pt: not a readable checkpoint"),
    "a web page as checkpoint": (lambda: write("ckpt.pt", "<html>"), "sample", "ckpt.pt: not a readable checkpoint"),
    "a checkpoint that runs code": (lambda: weights(lambda _: {"mean": Code()}), "sample", "ckpt.pt: not a readable"),
    "a checkpoint of one tensor": (lambda: write("ckpt.pt", torch.zeros(3)), "sample", "ckpt.pt: not a readable"),
    "a checkpoint of nothing": (lambda: write("ckpt.pt", {}), "sample", "ckpt.pt: not a MoDA that this version knows (it holds nothing)"),
    "the expert for the generator": (None, "sample --ckpt=expert.pt", "expert.pt: not a MoDA that this version knows (it holds ALSE)"),
    "a newer version's checkpoint": (lambda: change("ckpt.pt", config=lambda c: c | {"depth": 9}), "sample", "ckpt.pt"),
    "settings that are no number": (lambda: change("ckpt.pt", config=lambda c: c | {"n_one": ""}), "sample", "ckpt.pt"),
    "settings that make no network": (lambda: change("ckpt.pt", config=lambda c: {"heads": 0}), "sample", "ckpt.pt"),
    "settings of another width": (lambda: change("ckpt.pt", config=lambda c: c | {"width": 64}), "sample", "ckpt.pt: "),
    "a checkpoint without settings": (lambda: write("ckpt.pt", {"kind": "MoDA"}), "sample", "ckpt.pt"),
    "a checkpoint without a network": (lambda: change("ckpt.pt", model=lambda _: None), "sample", "ckpt.pt"),
    "a network that is a number": (lambda: change("ckpt.pt", model=lambda _: 3), "sample", "ckpt.pt"),
    "NaN in the weights": (lambda: weights(lambda m: {"std": nan + m["std"]}), "sample", "ckpt.pt: std is"),
    "weights of another shape": (lambda: weights(lambda m: {"std": torch.ones(71)}), "sample", "ckpt.pt: std is"),
    "a tensor too many": (lambda: weights(lambda m: {"spare": torch.zeros(1)}), "sample", "ckpt.pt: spare"),
    "weights that are a list": (lambda: weights(lambda m: {"head.bias": [0.0] * 70}), "sample", "ckpt.pt"),
    "half of the released file": (lambda: write("ckpt.pt", {"motion_embedder.mlp.0.weight": nan}), "sample", "ckpt.pt"),
    "no statistics": (lambda: weights(lambda m: {"std": torch.ones(70)}), "sample --stats=no.pt", "no.pt: not a readable"),
    "statistics without a std": (lambda: write("s.pt", {"mean": torch.zeros(70)}), "train --stats=s.pt", "s.pt: std"),
    "an expert that is none": (None, "train --alse=ckpt.pt", "ckpt.pt: not a ALSE that this version knows (it holds MoDA)"),
    "no expert": (None, "train --alse=nowhere.pt", "nowhere.pt: not a readable checkpoint ([Errno 2] No such file"),
    "nothing to start from": (None, "train --init_from=nowhere.pt", "nowhere.pt: not a readable checkpoint ([Errno 2] No such file"),
    "nothing to resume": (None, "resume --out_dir=nowhere", "ckpt.pt: not a readable checkpoint"),
    "another preset's run to resume": (None, "resume --width=64", "old/ckpt.pt: was trained with other settings"),
    "a run to resume without optimizer": (lambda: shutil.copy("expert.pt", "old/ckpt.pt"), "resume", "old/ckpt.pt"),
    "no audio encoder": (None, "sample --audio_encoder=nowhere", "nowhere"),
    "an empty folder as encoder": (None, "sample --audio_encoder=videos", "videos/pytorch_model.bin: not a readable"),
    "an encoder that is none": (encoder, "sample --audio_encoder=ears", "pytorch_model.bin: not wav2vec 2.0 or HuBERT"),
    "encoder settings in ruins": (lambda: encoder(config="{"), "sample --audio_encoder=ears", "config.json: not"),
    "an encoder cut short": (lambda: write("ears/model.safetensors", b"123"), "sample --audio_encoder=ears", "safeten"),
    "an encoder of other tensors": (lambda: safetensors({"a": dict(dtype="F32", shape=[9], data_offsets=[0, 16])}),
                                    "sample --audio_encoder=ears", "model.safetensors: not a readable"),
    # data sets
    "no data set": (None, "train --data_dir=nowhere", "nowhere/manifest.json: no train clips there"),
    "a file as data set": (None, "train --data_dir=text.txt", "text.txt/manifest.json"),
    "a manifest that is text": (lambda: write("set/manifest.json", "x"), "train", "set/manifest.json: no train clips"),
    "a manifest that is a list": (lambda: write("set/manifest.json", "[]"), "train", "set/manifest.json: no train"),
    "a manifest without clips": (lambda: manifest(clips=[]), "train", "no train clips"),
    "a manifest of validation only": (lambda: rows(lambda row: row | {"split": "val"}), "train", "no train clips"),
    "rows without a split": (lambda: rows(lambda row: {"file": row["file"]}), "train", "set/manifest.json"),
    "rows that are numbers": (lambda: rows(lambda row: 7), "train", "set/manifest.json"),
    "a manifest without moments": (lambda: write("set/manifest.json", '{"clips": []}'), "check", "set/manifest.json"),
    "moments of another shape": (lambda: manifest(moments=[[1] * 7] * 2), "train", "set/manifest.json"),
    "a clip missing": (lambda: Path("set/clips/1.safetensors").unlink(), "train", "set/clips/1.safetensors: not"),
    "a clip cut short": (lambda: cut("set/clips/1.safetensors", 5000), "train", "set/clips/1.safetensors: not a"),
    "an empty clip": (lambda: cut("set/clips/1.safetensors", 0), "train", "set/clips/1.safetensors: not a"),
    "a clip that runs code": (lambda: write("set/clips/1.safetensors", {"audio": Code()}), "train", "1.safetensors: not"),
    "a clip without motion": (lambda: data.write_safetensors({"audio": torch.zeros(90, 1, 160)},
                                                             "set/clips/1.safetensors"), "train", "clips/1.safetensors"),
    "a clip without sound": (lambda: data.write_safetensors({}, "set/clips/0.safetensors"), "check", "0.safetensors"),
    "a clip whose motion is short": (lambda: clip(motion=lambda m: m[:50]), "train", "set/clips/1.safetensors"),
    "a clip whose sound is short": (lambda: clip(audio=lambda a: a[:85]), "train", "set/clips/1.safetensors"),
    "a clip of another encoder": (lambda: clip(audio=lambda a: a.repeat(1, 12, 1)), "train", "clips/1.safetensors"),
    "a clip of 69 motion numbers": (lambda: clip(motion=lambda m: m[:, 1:].clone()), "train", "clips/1.safetensors"),
    "a clip of 20 keypoints": (lambda: clip(identity=lambda i: i[3:]), "train", "set/clips/1.safetensors"),
    "NaN in the motion": (lambda: [clip(k, motion=lambda m: nan + m) for k in (0, 1)], "train", "step 0: loss nan"),
    "no videos": (None, "prepare --videos=nowhere", "nowhere: no videos there"),
    "a file as videos": (None, "prepare --videos=text.txt", "text.txt: no videos there"),
    "a table of labels that is missing": (None, "prepare --labels=nowhere.csv", "nowhere.csv: cannot be used"),
    "an emotion that nobody knows": (lambda: write("l.csv", "clip,emotion\n1,glee"), "prepare --labels=l.csv", "l.csv"),
    "a preparation without weights": (None, "prepare", "appearance_feature_extractor.pth: not"),
    # places to write to
    "a file as folder of a training": (None, "train --out_dir=text.txt", "text.txt"),
    "a training below a file": (None, "train --out_dir=text.txt/new", "text.txt"),
    "a folder in the film's place": (lambda: Path("new.mp4").mkdir(), "sample --output_path=new.mp4", "new.mp4"),
    "a film of unknown kind": (None, "sample --output_path=film.nonsense", "film.nonsense: could not be written"),
    # requests that no sampler can answer
    "no steps": (None, "sample --steps=0", "steps=0 should be 1 or more"),
    "fewer steps than none": (None, "sample --steps=-3", "steps=-3 should be 1 or more"),
    "no chunk": (None, "sample --chunk=0", "chunk=0"),
    "an overlap as long as a chunk": (None, "sample --overlap=20", "overlap=20 < "),
    "a negative overlap": (None, "sample --overlap=-1", "overlap=-1 < "),
    "a first chunk longer than others": (None, "sample --first_chunk=30", "first_chunk=30 <= chunk=20"),
    "motion that is none": (None, "sample --motion_path=text.txt", "text.txt: no motion could be read"),
    # memory
    "a network too large": (None, "train --width=1000000", "memory"),
    "a chunk too large": (None, "sample --chunk=1000000000000", "memory"),
}


WRONG = {
    "sample --stepz=3": "unknown flag --stepz=3; known: ",
    "sample steps=3": "unknown flag steps=3",
    "sample --": "unknown flag --",
    "sample --steps=1.5": "--steps=1.5: expected int",
    "sample --steps=": "--steps=: expected int",
    "sample --steps=many": "--steps=many",
    "sample --cfg_audio=nan": "--cfg_audio=nan",
    "sample --pose_scale=inf": "--pose_scale=inf",
    "sample --cfg_emotion=much": "--cfg_emotion=much: expected float",
    "sample --stitch=maybe": "--stitch=maybe: expected bool",
    "sample --seed=1000000000000000000000": "--seed=1000000000000000000000",
    "sample --emotion=glee": "--emotion=glee: known are anger",
    "sample --emotion=9": "--emotion=9: known are anger",
    "sample --device=nonsense": "--device=nonsense",
    "sample --device=cuda:99": "--device=cuda:99",
    "sample --emotion=": "--emotion= is empty",
    "sample --audio_path=": "--audio_path=: which voice? a file",
    "sample --audio_path=- --motion_path=m.npy": "not with --motion_path",
    "sample --image_path=me.png": "--weights and --image_path go together",
    "sample --weights=videos": "--weights and --image_path go together",
    "sample --output_path=film": "--output_path=film",
    "sample --output_path=": "--output_path=",
    "sample --output_path=nowhere/film.mp4": "nowhere",
    "sample --output_path=/dev/full": "--output_path=/dev/full",
    "sample --output_path=voice.wav": "voice.wav",
    "sample --save_motion=nowhere/m.npy": "--save_motion",
    "sample --edit=grin:1": "--edit=grin:1: known are aaa",
    "sample --edit=smile:much": "--edit=smile:much",
    "train --steps=0": "--steps=0: should be 1 or more",
    "train --steps=1e3": "--steps=1e3: expected int",
    "train --batch_size=-2": "--batch_size=-2",
    "train --passes=3": "no multiple of 3, processes x --passes",
    "train --model=alse --passes=2": "no multiple of 4",
    "train --warmup=-1": "--warmup=-1: should be 0 or more",
    "train --learning_rate=nan": "--learning_rate=nan",
    "train --learning_rate=-1": "--learning_rate=-1.0",
    "train --tau=inf": "--tau=inf",
    "train --p_drop_audio=nan": "--p_drop_audio=nan",
    "train --seed=1000000000000000000000": "--seed=1000000000000000000000",
    "train --workers=-1": "--workers=-1",
    "train --preset=huge": "--preset=huge: known are moda, toy",
    "train --model=gan": "--model=gan: known are moda, alse",
    "train --fusion=late": "--fusion=late: known are c2f",
    "train --bf16=yes": "--bf16=yes: expected bool",
    "train --device=nonsense": "--device=nonsense",
    "prepare --crop=1,2": "--crop=x,y,size",
    "prepare --crop=-1,0,32": "--crop=x,y,size",
    "prepare --emotion=happy": "--emotion=hsemotion",
    "prepare --check": "--check",
    "prepare --data_dir=": "--data_dir=FOLDER",
    "prepare --device=nonsense": "--device=nonsense",
}


@pytest.mark.parametrize("spoil, command, words, code", [(*row, 1) for row in BAD.values()] + [
    (None, *row, 2) for row in WRONG.items()], ids=[*BAD, *WRONG])
def test_a_mistake_is_one_line_and_leaves_every_file_as_it_was(
        good, tmp_path, monkeypatch, capfd, spoil, command, words, code):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil()
    before = contents()
    ended, printed = go(*command.split(" "), monkeypatch=monkeypatch, capfd=capfd)
    lines = told(printed.err)
    assert ended == code and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], printed.err
    assert contents() == before and not Path("run_by_a_pickle").exists()


def test_a_pipe_is_refused_and_not_waited_for(good, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(good)
    os.mkfifo(tmp_path / "voice.wav")
    ended, printed = go("sample", f"--audio_path={tmp_path}/voice.wav", monkeypatch=monkeypatch, capfd=capfd)
    assert ended == 2 and "voice.wav: which voice? a file, no pipe" in printed.err and printed.err.count("\n") == 1


def start(folder, script, *flags, stdout=subprocess.DEVNULL, **options):
    """A command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder, process_group=0, text=True,
                            stdout=stdout, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("samples, flags, words", [(0, [], "-: no sound"), (32_000, ["--overlap=500"], "overlap=500")])
def test_a_mistake_is_told_while_the_microphone_is_still_open(good, tmp_path, samples, flags, words):
    process = start(good, "sample.py", "--ckpt=ckpt.pt", "--audio_path=-", f"--output_path={tmp_path}/film.mp4", *flags,
                    stdin=subprocess.PIPE)
    process.stdin.write("x" * 2 * samples)
    process.stdin.close() if samples == 0 else process.stdin.flush()
    lines = told("".join(process.stderr))
    assert process.wait() == 1 and len(lines) == 1 and words in lines[0] and not list(tmp_path.iterdir()), lines


@pytest.mark.parametrize("command, n, words", [
    ("sample", 5000, "film.mp4: could not be written"), ("train", 50_000, "ckpt.pt: could not be saved")])
def test_a_full_disk_harms_no_file(good, tmp_path, monkeypatch, command, n, words):
    """Files end after n bytes, in the command and in its ffmpeg."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = contents()
    script, usual = DOORS[command]
    process = start(tmp_path, f"{script.__name__}.py", *usual.split(),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)))
    lines = told(process.communicate()[1])
    assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    assert contents() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("lock, command, words, code", [
    ("voice.wav", "sample", "voice.wav", 1), ("ckpt.pt", "sample", "ckpt.pt", 1), ("me.png", "portrait", "me.png", 1),
    ("set/clips/1.safetensors", "train", "1.safetensors", 1), ("old", "train", "old", 1), (".", "sample", "--output_path=film.mp4", 2)])
def test_what_may_not_be_read_or_written_is_named(good, tmp_path, monkeypatch, capfd, lock, command, words, code):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = contents()
    Path(lock).chmod(0o500 if Path(lock).is_dir() else 0)
    ended, printed = go(*command.split(" "), monkeypatch=monkeypatch, capfd=capfd)
    Path(lock).chmod(0o700)
    lines = told(printed.err)
    assert ended == code and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], printed.err
    assert contents() == before


@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize("command", ["sample", "train --steps=100000 --save_every=100000"])
def test_ctrl_c_at_any_moment_is_one_line_and_no_file(good, tmp_path, monkeypatch, capfd, command, moment):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    sound(np.zeros(400_000))
    before = contents()
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, (moment + random.random()) / 12)
    ended, printed = go(*command.split(" "), monkeypatch=monkeypatch, capfd=capfd)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, usual)
    assert ended == 1 and told(printed.err) == ["error: interrupted"] and contents() == before


def test_ctrl_c_in_a_terminal_reaches_ffmpeg_too(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    sound(np.zeros(16_000_000))
    before = contents()
    process = start(tmp_path, "sample.py", *DOORS["sample"][1].split())
    seen = ""
    while not re.search(r"frames: [1-9]", seen):
        seen += process.stderr.read(1)
    time.sleep(random.random() / 10)
    os.killpg(process.pid, signal.SIGINT)
    assert told(seen + process.communicate()[1]) == ["error: interrupted"] and process.returncode == 1
    assert contents() == before


def test_a_reader_that_leaves_is_one_line(good):
    read, write = os.pipe()
    os.close(read)
    process = start(good, "data.py", "--data_dir=set", "--check", stdout=write)
    os.close(write)
    assert told(process.communicate()[1]) == ["error: [Errno 32] Broken pipe"] and process.returncode == 1


noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3000)
ODD = {
    "a voice": None,
    "one sample": lambda: sound([0.5]),
    "silence": lambda: sound(np.zeros(3000)),
    "a constant": lambda: sound(np.full(3000, 0.9)),
    "clipped": lambda: sound(30 * noise),
    "thirty times full scale": lambda: sound(30 * noise, subtype="FLOAT"),
    "24 bits": lambda: sound(noise, subtype="PCM_24"),
    "64 bits": lambda: sound(noise, subtype="DOUBLE"),
    "8 bits at 8 kHz": lambda: sound(noise, 8000, subtype="PCM_U8"),
    "96 kHz": lambda: sound(noise, 96000),
    "40 samples in five seconds": lambda: sound(np.full(40, 0.1), 8),
    "six channels": lambda: sound(noise.reshape(-1, 6)),
    "an mp3 cut in the middle": lambda: (encode("v.mp3", 1500), shutil.move("v.mp3", "voice.wav")),
    "a flac called wav": lambda: (sound(noise, name="v.flac"), shutil.move("v.flac", "voice.wav")),
    "weights in half precision": lambda: weights(lambda m: {key: x.half() for key, x in m.items()}),
    "weights in double precision": lambda: weights(lambda m: {key: x.double() for key, x in m.items()}),
}


@pytest.mark.parametrize("prepare", ODD.values(), ids=ODD)
def test_what_is_merely_odd_works(good, tmp_path, monkeypatch, capfd, prepare):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare()
    code, printed = go("sample", "--save_motion=m.npy", monkeypatch=monkeypatch, capfd=capfd)
    motion = np.load("m.npy", allow_pickle=False)
    assert code == 0 and not told(printed.err) and motion.shape[1] == 70 and np.isfinite(motion).all()
    assert imageio.get_reader("film.mp4").count_frames() == len(motion)
