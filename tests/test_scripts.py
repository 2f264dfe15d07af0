"""The commands of the README work on a fresh machine, a mistake costs one line, and no video is
ever half written."""
import csv
import dataclasses
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from tqdm import tqdm

import data
import moda
import sample
import train
from bad import folder, good, refused, run, start, write
from data import RATE, Sound, ToyTalker, UsageError, parse_flags, toy_clip, write_video
from forks import Script
from moda import MoDA
from renderer import LivePortrait, Sketch, write_template

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def script(*args):
    """What `python ...` prints."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def speak(trained, folder, samples, *flags, voice="v.wav", video="v.mp4"):
    """sample.py on the first `samples` of a toy voice -> the motion that --save_motion keeps."""
    soundfile.write(folder / voice, toy_clip(1, 80)[0][:samples], RATE)
    sampled = [f"--save_motion={folder}/m.npy", "--steps=2", "--chunk=40"]
    if "--motion_path" in " ".join(flags):
        sampled = []
    sample.main([f"--ckpt={trained}/ckpt.pt", f"--audio_path={folder / voice}",
                 f"--output_path={folder / video}", *sampled, *flags])
    return np.load(folder / "m.npy", allow_pickle=False)


def frames_of(path):
    return np.stack([frame for frame in imageio.get_reader(path)]).astype(int)


# ----------------------------------------------------------------------------------------- training
def test_a_short_training_already_moves_the_lips_with_the_voice(trained):
    printed = (trained / "stdout").read_text()
    metrics = {line[:17].strip(): line[17:].split() for line in printed.splitlines()}
    truth, model, other_voice, linear, other_seed = map(float, metrics["mouth corr"])
    assert truth == 1.0
    assert model > 0.5
    assert other_voice < 0.3
    assert 0.85 < linear < 0.99
    assert other_seed > 0.8
    with open(trained / "log.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 140
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])


def test_training_ends_with_a_video(trained):
    video = imageio.get_reader(trained / "sample.mp4")
    about = video.get_meta_data()
    assert (about["fps"], about["codec"], about["audio_codec"]) == (25, "h264", "aac")
    assert video.count_frames() == 200


def test_the_expert_trains_supervises_and_scores(trained, tmp_path):
    expert = tmp_path / "alse/ckpt.pt"
    train.main(["--model=alse", "--clips=6", "--steps=5", "--width=32",
                "--eval_every=0", "--eval_clips=0", f"--out_dir={expert.parent}"])
    train.main(["--clips=6", "--steps=2", "--p_drop_audio=0.1", f"--alse={expert}", "--tau=99",
                f"--out_dir={tmp_path}/moda", "--eval_clips=0", "--eval_every=0"])
    with open(tmp_path / "moda/log.csv") as file:
        assert float(next(csv.DictReader(file))["sync"]) > 0
    settings = sample.Settings(steps=2, alse=str(expert))
    model = MoDA.from_pretrained(trained / "ckpt.pt")
    table = sample.evaluate(settings, model, ToyTalker("val", 2), ToyTalker("train", 2))
    truth, ours, other_voice = table["truth"], table["model"], table["other voice"]
    assert truth["mouth corr"] > 0.999
    assert truth["Sync-D"] > 0
    assert ours["Sync-C"] >= 0
    assert truth["Sync-D"] != other_voice["Sync-D"]
    assert table["other seed"]["heads apart"] > 0


# ----------------------------------------------------------------------------------------- sampling
def test_the_command_makes_a_video_and_prints_how_long_it_took(trained, tmp_path):
    soundfile.write(tmp_path / "v.wav", toy_clip(1, 20)[0], RATE)
    printed = script("sample.py", f"--ckpt={trained}/ckpt.pt", f"--audio_path={tmp_path}/v.wav",
                     "--emotion=happiness", f"--output_path={tmp_path}/v.mp4")
    numbers = re.search(r"v.mp4: 20 frames in (\S+) s, (\S+) s per second of video$", printed, re.M)
    taken, factor = map(float, numbers.groups())
    assert taken > 0 and factor == pytest.approx(taken / 0.8, abs=0.01)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.mp4", "v.wav"]


@pytest.mark.parametrize("samples", [1, 640, 641, 40_000])
def test_a_video_is_as_long_as_its_sound(trained, tmp_path, soon_drawn, samples):
    motion = speak(trained, tmp_path, samples)
    frames = -(-samples // 640)                                # ceil(25 x seconds)
    assert motion.shape == (frames, 70)
    assert imageio.get_reader(tmp_path / "v.mp4").count_frames() == frames


def test_a_bar_that_is_switched_off_counts_frames_as_well(
        trained, tmp_path, soon_drawn, monkeypatch, capsys):
    monkeypatch.setattr(sample, "tqdm", partial(tqdm, disable=True))   # as TQDM_DISABLE does
    speak(trained, tmp_path, 3 * 640)
    assert "3 frames" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_motion_and_another_one_another_head(
        trained, tmp_path, soon_drawn):
    first, again, other = [speak(trained, tmp_path, 80 * 640, f"--seed={k}") for k in (1, 1, 2)]
    assert np.array_equal(first, again)
    assert np.corrcoef(first[:, 68], other[:, 68])[0, 1] < 0.9


def test_bfloat16_gives_nearly_the_same_motion(trained, tmp_path, soon_drawn):
    exact, rounded = [speak(trained, tmp_path, 40_000, *flags) for flags in ([], ["--bf16"])]
    assert 0 < np.square(rounded - exact).mean() < 0.1 ** 2 * exact.var(0).mean()


def test_saved_motion_gives_the_same_video_again(trained, tmp_path):
    speak(trained, tmp_path, 6400, "--emotion=sadness")
    first = frames_of(tmp_path / "v.mp4")
    speak(trained, tmp_path, 6400, f"--motion_path={tmp_path}/m.npy")
    assert np.array_equal(frames_of(tmp_path / "v.mp4"), first)


@pytest.fixture
def drawn(trained, tmp_path, monkeypatch):
    """Runs sample.py on a face whose own motion is changed -> the motion it is asked to draw."""
    def run(change, *flags):
        pieces = []

        class Face(Sketch):
            def source(self):
                usual = super().source()
                return usual._replace(motion=change(usual.motion))

            def frames(self, source, motion, **options):
                pieces.append(motion)
                return super().frames(source, motion)
        monkeypatch.setattr(sample, "Sketch", Face)
        speak(trained, tmp_path, 12_800, *flags)
        return np.concatenate(pieces)
    return run


def test_absolute_motion_takes_the_size_of_another_face(drawn, tmp_path):
    """Saved on one face and replayed on a larger one, it is what the larger one would have got."""
    def larger(motion):
        return 1.5 * motion
    large = drawn(larger, "--motion=absolute")
    small = drawn(torch.clone, "--motion=absolute")
    replayed = drawn(larger, "--motion=absolute", f"--motion_path={tmp_path}/m.npy")
    assert np.allclose(replayed, large, atol=1e-4)
    assert np.allclose(large[:, 63], 1.5 * small[:, 63], atol=1e-4)


def test_motion_is_relative_to_the_portraits_own_pose_by_default(drawn):
    def turned(motion):
        return motion + 15 * (torch.arange(70) == 68)
    yaw = drawn(turned)[:, 68] - drawn(torch.clone, "--motion=relative")[:, 68]
    assert np.abs(yaw - 15).max() < 3


def test_a_live_voice_gives_the_motion_and_the_video_of_its_file(trained, tmp_path):
    """Raw sound through a pipe, a video on stdout as it grows, and the same numbers as offline."""
    flags = "--chunk=20 --steps=2 --emotion=neutral:1,happiness".split()
    filed = speak(trained, tmp_path, 25_600, *flags)
    sound, _ = soundfile.read(tmp_path / "v.wav", dtype="int16")
    video = tmp_path / "live.ts"
    with open(video, "wb") as file:
        process = start(ROOT, "sample.py", f"--ckpt={trained}/ckpt.pt", "--audio_path=-",
                        "--output_path=-", f"--save_motion={tmp_path}/live.npy", *flags,
                        stdout=file.fileno())
    process.stdin.buffer.write(sound.tobytes())
    process.stdin.close()
    stderr = process.stderr.read()
    assert process.wait() == 0, stderr
    assert "sound to motion" in stderr and "sound to frame" in stderr
    about = next(imageio_ffmpeg.read_frames(video))
    assert about["audio_codec"] == "aac"
    assert imageio_ffmpeg.count_frames_and_secs(video)[0] == 40
    assert np.array_equal(np.load(tmp_path / "live.npy", allow_pickle=False), filed)


def test_emotions_in_turn_keep_to_the_clock():
    """Half frames do not add up, and an emotion without seconds lasts two."""
    turns = sample.emotions_in_turn("anger:0.5,fear:0.5,neutral,happiness")
    frames = dict.fromkeys(range(9), 0)
    for _, stride, emotion in moda.windows(torch.zeros(200, 1, 1), 40, 0, 0, turns):
        frames[emotion] += stride
    assert [frames[emotion] for emotion in (0, 3, 5, 4)] == [12, 13, 50, 50]


@pytest.mark.parametrize("ending", ".mp4 .MP4 .m4v .mov .mkv .ts".split())
def test_every_ending_holds_the_same_codecs_and_colours(tmp_path, ending):
    """H.264 and AAC at 48 kHz; BT.709, tagged: what a player shows is the colour that was drawn."""
    colour = 200, 60, 30
    frames = np.full((5, 64, 64, 3), colour, np.uint8)
    soundfile.write(tmp_path / "v.wav", np.zeros(3200), RATE)
    write_video(tmp_path / f"v{ending}", frames, Sound(tmp_path / "v.wav"))
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / f"v{ending}"],
                          capture_output=True, text=True)
    picture, voice = [line for line in done.stderr.splitlines() if "Stream #" in line]
    assert "h264" in picture and "tv, bt709" in picture and "bt709/" not in picture
    assert "aac" in voice and "48000 Hz" in voice
    about, *shown = imageio_ffmpeg.read_frames(tmp_path / f"v{ending}")
    shown = np.frombuffer(shown[2], np.uint8).reshape(-1, 3)
    assert np.abs(shown.mean(0) - colour).max() < 4


def test_the_bar_knows_how_long_the_video_will_be(trained, tmp_path, capfd):
    speak(trained, tmp_path, 3201)
    assert "6/6" in capfd.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_terminal_cannot_show_harms_nothing(trained, tmp_path, encoding):
    soundfile.write(tmp_path / "v.wav", np.zeros(640), RATE)
    name = os.fsencode(tmp_path) + "/film\u00e9".encode() + b"\xff.mp4"
    with open(tmp_path / "said", "w+") as file:
        process = Script("sample.py", f"--ckpt={trained}/ckpt.pt", f"--audio_path={tmp_path}/v.wav",
                         b"--output_path=" + name, env={"PYTHONIOENCODING": encoding},
                         stdout=file.fileno(), stderr=file.fileno())
        process.wait()
        file.seek(0)
        said = file.read()
    assert process.returncode == 0, said
    assert "1 frames" in said and "error" not in said
    assert os.path.getsize(name) > 1000


def test_file_names_may_hold_anything(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(voice="-my 'own' voice: 100%d.wav", video="-it's \"it\" %d.mp4")
    speak(trained, Path(), 1280, **names)
    assert imageio.get_reader(tmp_path / names["video"]).count_frames() == 2


@pytest.mark.parametrize("name, error", [
    ("v.mp4", OSError), ("v.mp4", KeyboardInterrupt), ("v.nonsense", ValueError)])
def test_a_failing_run_leaves_the_last_video_and_nothing_else(tmp_path, name, error):
    soundfile.write(tmp_path / "v.wav", np.zeros(6400), RATE)
    (tmp_path / name).write_text("the last video")

    def frames():
        yield from np.zeros((5, 64, 64, 3), np.uint8)
        if error is not ValueError:
            raise error("now")
    with pytest.raises(error, match="now|v.nonsense: could not be written"):
        with sample.appearing(tmp_path / name) as part:
            sample.write_video(part, frames(), Sound(tmp_path / "v.wav"))
    assert (tmp_path / name).read_text() == "the last video"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_kill_left_is_not_taken_for_the_video(tmp_path):
    soundfile.write(tmp_path / "v.wav", np.zeros(6400), RATE)
    for name in ("part-v.mp4", ".part-v.mp4"):
        (tmp_path / name).write_text("half of another video")
    with sample.appearing(tmp_path / "v.mp4") as part:
        sample.write_video(part, np.zeros((10, 64, 64, 3), np.uint8), Sound(tmp_path / "v.wav"))
    assert imageio.get_reader(tmp_path / "v.mp4").count_frames() == 10


# -------------------------------------------------------------------------------------------- pairs
@pytest.fixture
def faces(monkeypatch):
    """A drawn face stands in for LivePortrait -> the list of those that were loaded."""
    loaded = []

    def init(face, *args):
        loaded.append(face)
    monkeypatch.setattr(LivePortrait, "__init__", init)
    monkeypatch.setattr(LivePortrait, "source", lambda face, image: Sketch().source())
    monkeypatch.setattr(LivePortrait, "frames", lambda face, *args: Sketch().frames(*args))
    yield loaded
    sample.load_face.cache_clear()


def test_every_pair_becomes_a_video_and_broken_rows_are_passed_over(folder, run, faces):
    rows = ["me.png,voice.wav,happiness", "me.png,nobody.wav,anger", "text.txt,voice.wav,anger",
            "me.png,voice.wav,glee", "me.png,voice.wav", "me.png,voice.wav,sadness"]
    write("pairs.csv", "\n".join(["portrait,voice,emotion", *rows]))
    code, lines = run("pairs --pairs=pairs.csv --output_path=new/clips --weights=.")
    assert code == 0
    assert len(lines) == 4
    reasons = ["nobody.wav", "text.txt", "glee", "--emotion=:"]
    for number, (line, reason) in enumerate(zip(lines, reasons), 2):
        assert line.startswith(f"passed over: pairs.csv, row {number}: ")
        assert reason in line
    assert [path.name for path in sorted(Path("new/clips").glob("*.mp4"))] == ["001.mp4", "006.mp4"]
    assert len(faces) == 1
    assert not np.array_equal(frames_of("new/clips/001.mp4"), frames_of("new/clips/006.mp4"))


def test_a_table_may_have_spaces_behind_its_commas(folder, run):
    write("pairs.csv", "portrait, voice, emotion\n, voice.wav, none")
    assert run("pairs --pairs=pairs.csv --output_path=new") == (0, [])
    assert len(frames_of("new/001.mp4")) == 5


def test_a_table_that_is_not_there_leaves_no_folder(refused):
    refused("pairs --pairs=nowhere.csv --output_path=new", "nowhere.csv")
    assert not Path("new").exists()


def test_a_file_in_the_place_of_the_folder_for_videos(refused):
    write("pairs.csv", "portrait,voice,emotion\n,voice.wav,none")
    refused("pairs --pairs=pairs.csv --output_path=text.txt", "text.txt")


def test_a_template_can_be_saved_as_an_array(folder, run):
    motion = torch.randn(5, 70)
    write_template(motion, "m.pkl")
    assert run("play --motion_path=m.pkl --save_motion=m.npy") == (0, [])
    assert np.allclose(np.load("m.npy"), motion, atol=1e-4)


def test_a_table_that_is_none_is_one_line(refused):
    write("pairs.csv", 'portrait,voice,emotion\n"' + 200_000 * "x")
    refused("pairs --pairs=pairs.csv --output_path=clips", "field larger than field limit")


def test_a_run_over_pairs_that_was_killed_goes_on(folder, run):
    write("pairs.csv", "portrait,voice,emotion\n,voice.wav,none\n,voice.wav,none")
    write("clips/001.mp4", "made before")
    assert run("pairs --pairs=pairs.csv --output_path=clips") == (0, [])
    assert Path("clips/001.mp4").read_text() == "made before"
    assert len(frames_of("clips/002.mp4")) == 5


# -------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("module, settings", [
    (data, [data.Settings]), (train, [train.Settings, moda.Config]), (sample, [sample.Settings])])
def test_help_lists_every_setting_with_a_comment(capsys, module, settings):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert not ended.value.code                                # 0, as after success
    printed = capsys.readouterr().out
    assert module.__doc__ in printed
    rows = re.findall(r'^    (\w+): \w+ = "?(.*?)"? +# (\S.*)$', printed, re.M)
    listed = {name: default for name, default, comment in rows}
    fields = [field for kind in settings for field in dataclasses.fields(kind)]
    missing = {field.name for field in fields} - set(listed)
    assert not missing
    for field in fields:
        if field.type is not float:                            # which Python prints otherwise
            assert listed[field.name] == str(field.default)


def test_flags_have_the_types_of_their_defaults():
    settings, cfg = sample.Settings(), moda.Config()
    given = parse_flags(["--steps=3", "--latency=2", "--bf16", "--smooth=False", "--stats=a=1.pt",
                         "--width=64"], "", settings, cfg)
    assert given == dict(steps=3, latency=2.0, bf16=True, smooth=False, stats="a=1.pt", width=64)
    assert (settings.steps, settings.latency, cfg.width) == (3, 2.0, 64)
    assert (settings.bf16, settings.smooth, settings.stats) == (True, False, "a=1.pt")
    assert type(settings.latency) is float
    assert settings.chunk == 100


@pytest.mark.parametrize("main, argument, message", [
    (train, "--stepz=3", "unknown flag --stepz=3; known: --model, --preset"),
    (train, "--steps=many", "--steps=many: expected int"),
    (sample, "--seed=1", "--audio_path=: which voice?"),
    (sample, "--emotion=glee", "--emotion=glee: 'glee'. known are anger, contempt"),
    (sample, "--motion=both", "--motion=both: should be relative or absolute"),
    (sample, "--image_path=me.jpg", "--weights and --image_path go together")])
def test_wrong_flags_are_named_before_any_work(main, argument, message):
    flags = [argument]
    if main is sample:
        flags.append("--ckpt=nope.pt")
    if main is sample and argument != "--seed=1":
        flags.append("--audio_path=nope.wav")
    with pytest.raises(UsageError, match=message):
        main.main(flags)


def test_the_released_model_has_defaults_of_its_own_that_flags_override(monkeypatch):
    sizes = dict(width=32, heads=1, n_four=1, n_two=0, n_one=0)
    released = MoDA(moda.Config(**sizes, **moda.RELEASED_CONFIG))
    released.std.fill_(2)
    monkeypatch.setattr(MoDA, "from_pretrained", lambda path: released)
    settings = sample.Settings(chunk=50)
    sample.open_model(settings, given=dict(chunk=50))
    assert (settings.cfg_audio, settings.cfg_both, settings.smooth) == (0.0, 0.2, True)
    assert (settings.motion, settings.chunk) == ("absolute", 50)


def test_a_mistake_is_one_line_and_an_exit_code(trained, tmp_path):
    process = start(ROOT, "sample.py", "--audio_path=nope.wav", f"--ckpt={trained}/ckpt.pt",
                    f"--output_path={tmp_path}/out.mp4")
    said = process.stderr.read()
    assert process.wait() == 1
    assert "error: nope.wav" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
