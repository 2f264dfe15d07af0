"""The commands of the README work on a fresh machine, a mistake costs one line, and no film is ever half written."""
import csv
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

import sample
import train
from data import ToyTalker, UsageError, parse_flags, toy_clip
from moda import MoDA

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def script(*args, code=0):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="session")
def trained(training):
    out, run = training
    assert run.wait(timeout=400) == 0, (out / "told").read_text()
    return out, (out / "printed").read_text()


def speak(trained, folder, samples, *flags, voice="v.wav", film="v.mp4"):
    """sample.py on the first `samples` of a toy voice -> the motion that --save_motion keeps."""
    soundfile.write(folder / voice, toy_clip(1, 80)[0][:samples], 16000)
    sample.main([f"--ckpt={trained[0]}/ckpt.pt", f"--audio_path={folder / voice}", f"--output_path={folder / film}",
                 f"--save_motion={folder}/m.npy", "--steps=2", "--chunk=40", *flags])
    return np.load(folder / "m.npy", allow_pickle=False)


def test_a_short_training_already_moves_the_lips_with_the_voice(trained):
    out, printed = trained
    rows = {line[:15].strip(): line[15:].split() for line in printed.splitlines()}
    assert float(rows["truth"][0]) == 1.0
    assert float(rows["model"][0]) > 0.5 > 0.3 > float(rows["shuffled audio"][0])
    losses = [float(row["loss"]) for row in csv.DictReader(open(out / "log.csv"))]
    assert len(losses) == 180 and np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])


def test_training_ends_with_a_film_and_a_strip(trained):
    out, _ = trained
    film = imageio.get_reader(out / "sample.mp4")
    about = film.get_meta_data()
    assert about["fps"] == 25 and about["codec"] == "h264" and about["audio_codec"] == "aac"
    assert film.count_frames() == 200 and imageio.imread(out / "sample.png").shape == (440, 1280, 3)


def test_the_command_makes_a_film_and_says_what_each_stage_took(trained, tmp_path):
    soundfile.write(tmp_path / "v.wav", toy_clip(1, 20)[0], 16000)
    printed = script("sample.py", f"--ckpt={trained[0]}/ckpt.pt", f"--audio_path={tmp_path}/v.wav",
                     "--emotion=happiness", f"--output_path={tmp_path}/v.mp4")
    assert "v.mp4: 20 frames; " in printed
    for stage in ("loading", "sound", "motion", "render", "encode", "first frame after", "real-time factor", "steady"):
        assert float(printed.split(f"{stage} ")[1].split()[0].rstrip(",")) >= 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.mp4", "v.wav"]


@pytest.mark.parametrize("samples", [1, 640, 641, 40_000])
def test_a_film_is_as_long_as_its_sound(trained, tmp_path, samples):
    motion = speak(trained, tmp_path, samples)
    frames = -(-samples // 640)                                              # ceil(25 x seconds)
    assert imageio.get_reader(tmp_path / "v.mp4").count_frames() == frames and motion.shape == (frames, 70)


def test_the_same_seed_makes_the_same_motion_and_another_one_another_head(trained, tmp_path):
    first, again, other = (speak(trained, tmp_path, 80 * 640, f"--seed={seed}") for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.corrcoef(first[:, 68], other[:, 68])[0, 1] < 0.9


def test_bfloat16_makes_nearly_the_same_motion(trained, tmp_path):
    exact, rounded = (speak(trained, tmp_path, 40_000, *flags) for flags in ((), ("--bf16",)))
    assert 0 < np.square(rounded - exact).mean() < 0.1 ** 2 * exact.var(0).mean()


def frames_of(film):
    return np.stack([frame for frame in imageio.get_reader(film)]).astype(int)


def test_saved_motion_makes_the_same_film_again_and_takes_edits(trained, tmp_path):
    speak(trained, tmp_path, 12_800, "--emotion=sadness")
    film = frames_of(tmp_path / "v.mp4")
    again = lambda *flags: speak(trained, tmp_path, 12_800, f"--motion_path={tmp_path}/m.npy", *flags)
    for flags in [], ["--stream"]:
        again(*flags)
        assert np.array_equal(frames_of(tmp_path / "v.mp4"), film)
    again("--edit=smile:1,brow:5")
    assert np.abs(frames_of(tmp_path / "v.mp4") - film).mean((1, 2, 3)).min() > 0.1


def test_saved_motion_takes_the_size_of_another_face(trained, tmp_path, monkeypatch):
    """--absolute: motion saved on one face and replayed on a larger one is what the larger one would have been given."""
    drawn, source, draw = {}, sample.Sketch.source, sample.Sketch.frames

    def on(size, name, *flags):
        of_size = lambda face: source(face)._replace(motion=source(face).motion * size)
        frames = lambda face, who, motion, **options: drawn.update({name: motion}) or draw(face, who, motion)
        monkeypatch.setattr(sample.Sketch, "source", of_size)
        monkeypatch.setattr(sample.Sketch, "frames", frames)
        speak(trained, tmp_path, 12_800, "--absolute", *flags)
    on(1.5, "large")
    on(1.0, "small")
    on(1.5, "replayed", f"--motion_path={tmp_path}/m.npy")
    assert np.allclose(drawn["replayed"], drawn["large"], atol=1e-4)
    assert np.allclose(drawn["large"][:, 63], 1.5 * drawn["small"][:, 63], atol=1e-4)


def test_a_live_voice_gives_the_motion_and_the_film_of_its_file(trained, tmp_path):
    """Raw sound on stdin, a film on stdout as it grows, and the same numbers as offline."""
    filed = speak(trained, tmp_path, 25_600, "--emotion=neutral:1,happiness", "--chunk=20")
    sound = soundfile.read(tmp_path / "v.wav", dtype="int16")[0].tobytes()
    done = subprocess.run([sys.executable, "sample.py", f"--ckpt={trained[0]}/ckpt.pt", "--audio_path=-", "--steps=2",
                           "--output_path=-", "--chunk=20", "--emotion=neutral:1,happiness",
                           f"--save_motion={tmp_path}/live.npy"], cwd=ROOT, input=sound, capture_output=True, timeout=300)
    assert done.returncode == 0 and b"after their sound" in done.stderr, done.stderr
    (tmp_path / "live.ts").write_bytes(done.stdout)
    about = next(imageio_ffmpeg.read_frames(tmp_path / "live.ts"))
    assert about["audio_codec"] == "aac" and imageio_ffmpeg.count_frames_and_secs(tmp_path / "live.ts")[0] == 40
    assert np.array_equal(np.load(tmp_path / "live.npy", allow_pickle=False), filed)


def test_emotions_in_turn_keep_to_the_clock(trained, tmp_path, monkeypatch):
    """Spells of half a frame too much do not add up, and a spell without seconds lasts two."""
    given, stream = [], sample.stream
    monkeypatch.setattr(sample, "stream", lambda *args, **options: given.extend(args[4]) or stream(*args, **options))
    speak(trained, tmp_path, 6400, "--emotion=anger:0.5,fear:0.5,neutral,happiness")
    assert given == [(0, 12), (3, 13), (5, 50), (4, np.inf)]


def test_file_names_may_hold_anything(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speak(trained, Path(), 1280, voice="-my 'own' voice: 100%d.wav", film="-it's \"it\" %d.mp4")
    assert imageio.get_reader(tmp_path / "-it's \"it\" %d.mp4").count_frames() == 2


@pytest.mark.parametrize("name, error", [("v.mp4", ValueError), ("v.mp4", KeyboardInterrupt), ("v.nonsense", OSError)])
def test_a_failing_run_leaves_the_last_film_and_nothing_else(tmp_path, name, error):
    soundfile.write(tmp_path / "v.wav", np.zeros(6400), 16000)
    (tmp_path / name).write_text("the last film")

    def frames():
        yield from np.zeros((5, 64, 64, 3), np.uint8)
        if error is not OSError:
            raise error("now")
    with pytest.raises(error, match="now|v.nonsense: could not be written .*Invalid argument"):
        sample.write_video(tmp_path / name, frames(), tmp_path / "v.wav")
    assert (tmp_path / name).read_text() == "the last film" and len(list(tmp_path.iterdir())) == 2


def test_the_expert_trains_supervises_and_scores(trained, tmp_path):
    train.main(["--model=alse", "--clips=6", "--steps=5", "--width=32", f"--out_dir={tmp_path}/alse"])
    train.main(["--clips=6", "--steps=2", "--p_drop_audio=0.1", f"--alse={tmp_path}/alse/ckpt.pt", "--tau=99",
                f"--out_dir={tmp_path}/moda", "--eval_clips=0"])
    rows = list(csv.DictReader(open(tmp_path / "moda/log.csv")))
    assert float(rows[0]["sync"]) > 0
    flags = parse_flags(sample.__doc__, ["--steps=2", f"--alse={tmp_path}/alse/ckpt.pt"])
    table = sample.evaluate(flags, MoDA.from_pretrained(trained[0] / "ckpt.pt"), ToyTalker("val", 2))
    assert table["truth"]["mouth corr"] > 0.999 and table["truth"]["Sync-D"] > 0 <= table["model"]["Sync-C"]
    assert table["truth"]["Sync-D"] != table["shuffled audio"]["Sync-D"]
    assert table["model"]["pose diversity"] > 0 and "pose diversity" not in table["truth"]


@pytest.mark.parametrize("main, argument, message", [
    (train, "--stepz=3", "unknown flag --stepz=3; known: model, preset"),
    (train, "--steps=many", "--steps=many: expected int"),
    (sample, "--seed=1", "--audio_path=: which voice?"),
    (sample, "--emotion=glee", "--emotion=glee: known are anger, contempt"),
    (sample, "--image_path=me.jpg", "--weights and --image_path go together")])
def test_wrong_flags_are_named_before_any_work(main, argument, message):
    voice = [] if argument == "--seed=1" else ["--audio_path=nope.wav"]
    with pytest.raises(UsageError, match=message):
        main.main([argument, "--ckpt=nope.pt", *voice] if main is sample else [argument])


def test_a_mistake_is_one_line_and_an_exit_code(trained, tmp_path):
    said = script("sample.py", "--audio_path=nope.wav", f"--ckpt={trained[0]}/ckpt.pt",
                  f"--output_path={tmp_path}/out.mp4", code=1)
    assert "error: nope.wav" in said and "Traceback" not in said and not list(tmp_path.iterdir())
