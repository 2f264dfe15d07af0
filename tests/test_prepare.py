"""Talking videos become a data set: frames and sound in step, killed runs go on, a broken video costs only itself."""
import csv
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import data
import train
from data import (HOP, MOUTH, RATE, Clips, UsageError, opened, read_safetensors, toy_clip, write_manifest,
                  write_safetensors)
from renderer import crop_box, to_motion

ROOT = Path(__file__).parent.parent
T = 100
# a stand-in for M whose mouth opening is the brightness of the picture, and whose pose is that of the training set
STAND_IN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, data
def heads(net, x):
    time.sleep(0.02)
    grey = x.mean((1, 2, 3))[:, None]
    at = lambda angle: (-((torch.arange(66) * 3 - 97.5 - angle) / 3) ** 2).expand(len(x), -1)
    exp = torch.zeros(len(x), 63)
    exp[:, {MOUTH}:{MOUTH + 1}] = grey / 10 - 0.05
    return dict(exp=exp, kp=grey.expand(-1, 63), scale=1.28 + 0 * grey, t=torch.tensor([0, 0.1, 0]).expand(len(x), -1),
                pitch=at(-2), yaw=at(0), roll=at(0))
class Face:
    device, M = torch.device("cpu"), None
    def __init__(self, *args): pass
"""
PATCH = "data.LivePortrait, data.motion_heads = Face, heads; data.run(data.main)"


def ffmpeg(*args):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, args)], check=True)


def film(path, seed=0, frames=T, rate=25, late=0, sound=(), size="64x48"):
    """A toy clip whose mouth opening is the brightness of the picture; `late` frames of silence before the voice."""
    wav, motion, *_ = toy_clip(seed, frames)
    wav = np.concatenate([np.zeros(late * HOP, np.float32), wav])[:len(wav)]
    soundfile.write(path.with_suffix(".wav"), wav, RATE)
    grey = (10 * (motion[:, MOUTH] + 0.05) * 255).clip(0, 255).round().astype(np.uint8)
    picture = np.broadcast_to(grey[:, None, None, None], (frames, 48, 64, 3)).tobytes()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", "25", "-i", "-"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *raw, "-i", path.with_suffix(".wav"), "-map", "0:v",
                    "-map", "1:a", "-vf", f"fps={rate},scale={size}", "-pix_fmt", "yuv420p", *sound, path], input=picture, check=True)
    path.with_suffix(".wav").unlink()
    return motion


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Five clips at several rates, in folders, one named like an emotion; one whose voice is 8 frames late."""
    root = tmp_path_factory.mktemp("videos")
    for folder in ("angry", "it's: a né dir", "late"):
        (root / folder).mkdir()
    film(root / "angry/30.mp4", 1, rate=30)
    film(root / "it's: a né dir/12.5.mkv", 2, rate=12.5)
    film(root / "24.mp4", 3, rate=23.976)
    film(root / "late/voice.mp4", 4, late=8)
    film(root / "quiet.mp4", 5, sound=["-af", "volume=0"])
    return root


@pytest.fixture
def stand_in(monkeypatch):
    names = {}
    exec(STAND_IN, names)
    monkeypatch.setattr(data, "LivePortrait", names["Face"])
    monkeypatch.setattr(data, "motion_heads", names["heads"])


def run(*args, limit=None):
    """python data.py with the stand-in, in a process of its own; `limit` in bytes is the largest file it may write."""
    size = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.Popen([sys.executable, "-c", STAND_IN + PATCH, *map(str, args)], preexec_fn=size,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepare(videos, data_dir, *flags):
    data.main([f"--videos={videos}", f"--data_dir={data_dir}", "--weights=unused", *flags])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def prepared(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    process = run(f"--videos={videos}", f"--data_dir={folder}", "--weights=unused")
    assert process.wait() == 0, process.stderr.read()
    return folder


def test_frame_and_sound_belong_together_whatever_the_rates(prepared):
    clips = Clips.open(prepared, "")
    names = [path.stem for path in clips.clips]
    assert sorted(names) == ["12.5.mkv", "24.mp4", "30.mp4", "quiet.mp4", "voice.mp4"]
    for name, seed, slack in (("30.mp4", 1, 0.8), ("12.5.mkv", 2, 0.8), ("24.mp4", 3, 0.8), ("voice.mp4", 4, 0.98)):
        clip, emotion = opened(clips.clips[names.index(name)]), clips.emotion[names.index(name)]
        motion, audio, identity = clip["motion"], clip["audio"], clip["identity"]
        wav, true, *_ = toy_clip(seed, T)
        assert T - 2 <= len(motion) == len(audio) <= T and audio.shape[1:] == (1, 160) and identity.shape == (63,)
        fit = [np.corrcoef(motion[5:90, MOUTH], true[5 + k:90 + k, MOUTH])[0, 1] for k in (-2, -1, 0, 1, 2)]
        assert abs(np.argmax(fit) - 2) <= (name == "12.5.mkv") and fit[2] > slack, (name, fit)
        assert emotion == (0 if name == "30.mp4" else 8)
    k = names.index("12.5.mkv")                                              # MP4's AAC is not that exact
    assert np.allclose(identity, opened(clips.clips[names.index("voice.mp4")])["motion"][:, MOUTH].mean() * 10 + 0.5, atol=0.02)


def test_sound_that_starts_late_stays_in_step_with_the_picture(videos, tmp_path):
    film(tmp_path / "a.mkv", 1, sound=["-c:a", "pcm_s16le"])
    ffmpeg("-i", tmp_path / "a.mkv", "-itsoffset", "0.4", "-i", tmp_path / "a.mkv", "-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "b.mkv")
    early, late = (data.load_audio(tmp_path / name) for name in ("a.mkv", "b.mkv"))
    assert len(late) == len(early) + 10 * HOP and np.array_equal(late[10 * HOP:], early) and not late[:10 * HOP].any()


def test_a_window_is_what_lies_on_disk_and_statistics_are_those_of_the_training_clips(prepared):
    clips, rows = Clips.open(prepared, "train"), json.loads((prepared / "manifest.json").read_text())["clips"]
    splits = [row["split"] for row in rows]
    assert splits.count("val") == 1 == len(Clips.open(prepared, "val").length) and splits.count("train") == 4
    stored = [read_safetensors(clip) for clip in clips.clips]
    motion, audio = stored[1]["motion"], stored[1]["audio"]
    assert audio.dtype == torch.float16
    item = clips[len(stored[0]["motion"]) - 80 + 7]
    assert torch.equal(item["motion"], motion[8:88]) and torch.equal(item["prev"], motion[7])
    assert torch.equal(item["audio"], audio[8:88].float()) and item["mask"].all()
    whole = torch.cat([clip["motion"] for clip in stored]).double()
    assert np.allclose(clips.moments, torch.stack([whole.mean(0), whole.std(0, correction=0)]), atol=1e-6)


def test_a_window_touches_only_its_own_bytes(tmp_path):
    made_up(tmp_path, lengths=(3000,), features=(12, 768))                   # 55 MB
    def read():
        return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()         # shared, mapped
    clips, before = Clips.open(tmp_path), read()
    kept = [clips[k] for k in (0, 1500, 2900)]
    assert read() - before < 25e6 and len(kept) == 3


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(videos, prepared, tmp_path):
    chance, folder = random.Random(7), tmp_path / "set"
    for goal in (0, 3):
        process = run(f"--videos={videos}", f"--data_dir={folder}", "--weights=unused")
        while process.poll() is None and len(list(folder.glob("clips/**/*.safetensors"))) < goal + 1:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = {name: text for name, text in contents(folder).items() if name.endswith(".safetensors")}
        assert all(contents(prepared)[name] == text for name, text in done.items())
    process = run(f"--videos={videos}", f"--data_dir={folder}", "--weights=unused")
    assert process.wait() == 0 and contents(folder) == contents(prepared)


def test_other_settings_than_those_begun_with_are_refused(stand_in, videos, prepared):
    before = contents(prepared)
    with pytest.raises(ValueError, match="begun with other settings.*'crop': ''"):
        prepare(videos, prepared, "--crop=0,0,32")
    assert contents(prepared) == before


def test_the_network_sees_the_crop_at_25_frames_per_second(tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    path = tmp_path / "v/a.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=640x480:r=25", "-f", "lavfi", "-i", "sine=f=300", "-t", "0.24", "-crf", "5", path)
    frame = Image.fromarray(imageio.get_reader(path).get_data(3))
    for crop in ("", "101,11,300"):
        shown = torch.cat(list(data.pictures(path, crop)))
        x, y, size = crop_box(frame, crop)
        small = np.array(frame.crop((x, y, x + size, y + size)).resize((256, 256), Image.BOX))
        apart = np.abs(shown.numpy().astype(float) - small).mean((1, 2, 3))
        assert len(shown) == 6 and apart.argmin() == 3 and apart[3] < 4      # grey levels

    def heads(net, x):                                                       # M's outputs are some of the pixels
        rows = dict(exp=63, kp=63, scale=1, t=3, pitch=66, yaw=66, roll=66)
        return {name: 9 * x[:, 0, 30 * k, 50:50 + n] for k, (name, n) in enumerate(rows.items())}
    seen = heads(None, shown.movedim(-1, 1) / 255)
    monkeypatch.setattr(data, "motion_heads", heads)
    monkeypatch.setattr(data, "LivePortrait", lambda *args: types.SimpleNamespace(device="cpu", M=None))
    monkeypatch.setattr(Clips, "frames", 4)
    prepare(tmp_path / "v", tmp_path / "set", f"--crop={crop}")
    clip = opened(Clips.open(tmp_path / "set").clips[0])
    motion, identity = clip["motion"], clip["identity"]
    assert np.allclose(motion, to_motion(seen), atol=1e-3)
    assert np.allclose(identity, seen["kp"].mean(0), atol=1e-3)


def test_bad_videos_are_named_and_harm_no_other(stand_in, tmp_path, capsys):
    root = tmp_path / "videos"
    root.mkdir()
    film(root / "good.mp4", 1)
    film(root / "short.mp4", 2, frames=7)
    film(root / "8k.mkv", 3, sound=["-ar", "8000", "-c:a", "pcm_s16le"])
    film(root / "96k.mkv", 4, sound=["-ar", "96000", "-c:a", "pcm_s16le"])
    film(root / "six.mkv", 5, sound=["-ac", "6", "-c:a", "flac"])
    ffmpeg("-i", root / "good.mp4", "-an", "-c", "copy", root / "mute.mp4")
    ffmpeg("-i", root / "good.mp4", "-vn", "-c", "copy", root / "blind.mp4")
    ffmpeg("-i", root / "good.mp4", "-t", "0", "-c", "copy", root / "none.mkv")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=320x240:r=25", "-f", "lavfi", "-i", "sine", "-t", "6", "-movflags", "faststart", root / "cut.mp4")
    (root / "cut.mp4").write_bytes((root / "cut.mp4").read_bytes()[:150_000])
    (root / "moov.mp4").write_bytes((root / "good.mp4").read_bytes()[:3000])
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.avi").write_text("no film at all")
    prepare(root, tmp_path / "set")
    told = capsys.readouterr()
    lines = sorted(told.out.splitlines()[1:])
    bad = ["blind.mp4", "cut.mp4", "empty.mp4", "moov.mp4", "mute.mp4", "none.mkv", "short.mp4", "text.avi"]
    assert [Path(line.split(": ")[0]).name for line in lines] == bad
    reasons = dict(zip(bad, lines))
    assert "no picture" in reasons["blind.mp4"] and "no sound" in reasons["mute.mp4"] and "7 frames" in reasons["short.mp4"]
    assert "no picture" in reasons["cut.mp4"] and "4 clips" in told.out and "8 videos left out" in told.out
    assert len(Clips.open(tmp_path / "set", "").length) == 4 and not list(tmp_path.rglob("*.tmp"))


def test_nothing_usable_is_one_error(stand_in, tmp_path, videos):
    with pytest.raises(ValueError, match="no videos there"):
        prepare(tmp_path / "nowhere", tmp_path / "set")
    (tmp_path / "v").mkdir()
    (tmp_path / "v/x.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(tmp_path / "v", tmp_path / "set")
    with pytest.raises(ValueError, match="no train clips"):
        Clips.open(tmp_path / "set")
    shutil.copy(videos / "24.mp4", tmp_path / "v/x.mp4")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(tmp_path / "v", tmp_path / "other", "--crop=0,0,49")
    for flags in (["--crop=1,2"], ["--emotion=happy"], ["--check"]):
        with pytest.raises(UsageError):
            prepare(tmp_path / "v", tmp_path / "set", *flags)


def test_a_full_disk_ends_in_one_line_and_a_second_run_completes_the_set(stand_in, videos, prepared, tmp_path):
    folder = tmp_path / "set"
    process = run(f"--videos={videos}", f"--data_dir={folder}", "--weights=unused", limit=30_000)      # a clip: 65 kB
    out, err = process.communicate()
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(error) == 1 and "could not be saved" in error[0] and "Traceback" not in err
    assert not list(folder.glob("clips/**/*.safetensors"))
    prepare(videos, folder)
    assert contents(folder) == contents(prepared)


def test_labels_come_from_a_table_a_folder_or_the_classifier(stand_in, videos, tmp_path, monkeypatch):
    def emotions(name, *flags):
        prepare(videos, tmp_path / name, *flags)
        rows = json.loads((tmp_path / name / "manifest.json").read_text())["clips"]
        return {row["file"][6:-12]: row["emotion"] for row in rows}
    table = tmp_path / "labels.csv"
    table.write_text("clip,emotion\n24,Surprised\nlate/voice.mp4,1\n")
    assert emotions("table", f"--labels={table}") == {
        "24.mp4": 7, "late/voice.mp4": 1, "angry/30.mp4": 0, "quiet.mp4": 8, "it's: a né dir/12.5.mkv": 8}
    for text in ("clip,emotion\n24,furious\n", "24,happy\n25,sad\n", "clip,emotion\n24\n"):
        table.write_text(text)
        with pytest.raises(ValueError, match="labels.csv: cannot be used"):
            emotions("bad", f"--labels={table}")
    table.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="labels.csv: cannot be used"):
        emotions("bad", f"--labels={table}")
    with pytest.raises(ValueError, match="nowhere.csv: cannot be used"):
        emotions("bad", "--labels=nowhere.csv")

    monkeypatch.setitem(sys.modules, "hsemotion_onnx", None)
    with pytest.raises(ImportError, match="hsemotion_onnx"):
        emotions("bad", "--emotion=hsemotion")
    assert not (tmp_path / "bad").exists()

    class HSEmotionRecognizer:                                               # the interface of hsemotion-onnx 0.3.1
        idx_to_class = dict(enumerate("Anger Contempt Disgust Fear Happiness Neutral Sadness Surprise".split()))

        def __init__(self, name):
            pass

        def predict_emotions(self, image, logits=True):
            assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and not logits
            return "Sadness", np.eye(8)[6]
    module = types.SimpleNamespace(HSEmotionRecognizer=HSEmotionRecognizer)
    monkeypatch.setitem(sys.modules, "hsemotion_onnx", types.SimpleNamespace(facial_emotions=module))
    monkeypatch.setitem(sys.modules, "hsemotion_onnx.facial_emotions", module)
    found = emotions("classified", "--emotion=hsemotion")
    assert found["24.mp4"] == 6 and found["angry/30.mp4"] == 0


def test_features_of_an_encoder_are_those_of_the_whole_clip(stand_in, videos, tmp_path, monkeypatch):
    class Encoder:
        def blocks(self, pieces):
            wav, = pieces
            assert wav.dtype == np.float32 and len(wav) % HOP == 0
            yield torch.from_numpy(wav).view(-1, 1, HOP)[..., :6].repeat(1, 3, 1)
    monkeypatch.setattr(data, "AudioEncoder", types.SimpleNamespace(from_pretrained=lambda path, device: Encoder()))
    (tmp_path / "v").mkdir()
    shutil.copy(videos / "24.mp4", tmp_path / "v")
    prepare(tmp_path / "v", tmp_path / "set", "--audio_encoder=hubert")
    assert Clips.open(tmp_path / "set").audio_shape == (3, 6)
    monkeypatch.setattr(Encoder, "blocks", lambda self, pieces: [torch.full((len(pieces[0]) // HOP, 1, 2), 1e6)])
    with pytest.raises(ValueError, match="none of its"):                     # float16 ends at 65504
        prepare(tmp_path / "v", tmp_path / "large", "--audio_encoder=hubert")


def test_the_check_finds_the_shifted_soundtrack(prepared, capsys):
    data.main([f"--data_dir={prepared}", "--check"])
    told = capsys.readouterr().out
    assert "5 clips" in told and "anger 1, " in told and "none 4" in told and "-2.3407 +-  8.8819" in told
    odd = [line for line in told.splitlines() if "LOOK: voice" in line]
    assert len(odd) == 1 and "voice.mp4.safetensors: voice +8 frames after the lips" in odd[0] and "LOOK: pitch" not in told


def made_up(folder, lengths=(200, 90), features=(1, 160)):
    """A data set of random numbers."""
    (folder / "clips").mkdir(parents=True)
    rows = [dict(file=f"clips/{k}.safetensors", emotion=8, split="train") for k in range(len(lengths))]
    for n, row in zip(lengths, rows):
        clip = dict(motion=torch.randn(n, 70), audio=torch.zeros(n, *features).half(), identity=torch.zeros(63))
        write_safetensors(clip, folder / row["file"])
    write_manifest(dict(clips=rows, moments=[[0] * 70, [1] * 70]), folder / "manifest.json")
    return folder


def test_damaged_data_sets_are_one_line(tmp_path):
    damage = {
        "missing": lambda clip: clip.unlink(),
        "truncated": lambda clip: clip.write_bytes(clip.read_bytes()[:5000]),
        "empty": lambda clip: clip.write_bytes(b""),
        "code": lambda clip: torch.save(run, clip),
    }
    for name, harm in damage.items():
        harm(made_up(tmp_path / name) / "clips/1.safetensors")
        with pytest.raises(ValueError, match=r"1\.safetensors.*prepare the data again") as caught:
            Clips.open(tmp_path / name)
        assert "\n" not in str(caught.value)
    for content in (dict(), dict(clips=[]), dict(settings={})):
        write_manifest(content, tmp_path / "code/manifest.json")
        with pytest.raises(ValueError, match="manifest.json: no train clips there"):
            Clips.open(tmp_path / "code")
    with pytest.raises(ValueError, match="nowhere.*No such file.*; prepare a data set"):
        Clips.open(tmp_path / "nowhere")


def test_training_takes_the_prepared_set(prepared, tmp_path):
    train.main([f"--data_dir={prepared}", "--steps=3", "--batch_size=2", "--eval_clips=0", "--width=32", "--workers=1",
                f"--out_dir={tmp_path}"])
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert len(rows) == 3 and all(np.isfinite(float(row["loss"])) for row in rows)
