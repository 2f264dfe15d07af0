"""Talking videos become a data set: frames and sound in step, killed runs go on, a broken video
costs only itself."""
import csv
import json
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
import types
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import bad
import data
import train
from build import ffmpeg, video
from data import FRAME, Clips, UsageError, toy_clip
from moda import MOUTH
from renderer import crop_box, to_motion
from stand_in import LivePortrait, brightness

HERE = Path(__file__).parent
T = 100


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Five clips at several rates; a folder named like an emotion; a voice 8 frames late."""
    root = tmp_path_factory.mktemp("videos")
    for folder in "angry", "it's: a né dir", "late":
        (root / folder).mkdir()
    video(root / "angry/30.mp4", 1, rate=30)
    video(root / "it's: a né dir/12.5.mkv", 2, rate=12.5)
    video(root / "24.mp4", 3, rate=23.976)
    video(root / "late/voice.mp4", 4, late=8)
    video(root / "quiet.mp4", 5, sound=["-af", "volume=0"])
    return root


def still(*work):
    """In place of data.extract: any video is a face that does not move, in silence."""
    return dict(motion=[torch.zeros(T, 70)], audio=[torch.zeros(T, 1, 160).half()],
                identity=[torch.zeros(63)], loudness=[torch.zeros(T)])


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(data, "LivePortrait", LivePortrait)


def prepare(videos, data_dir, *flags):
    data.main([f"--videos={videos}", f"--data_dir={data_dir}", "--weights=unused", *flags])


def start(videos, data_dir, largest=resource.RLIM_INFINITY, env=None):
    """The same in a process of its own, which may write files of so many bytes."""
    return bad.start(".", "tests/stand_in.py", f"--videos={videos}", f"--data_dir={data_dir}",
                     "--weights=unused", largest=largest, env=env)


def start_both(videos, data_dir):
    """The same in two processes that share the videos, as torchrun starts them."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])        # a free one
    about = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    return [start(videos, data_dir, env=about | dict(RANK=rank)) for rank in "01"]


def contents(folder):
    """The bytes of every file, by its name."""
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def complete(folder):
    """The same, of clips that are complete."""
    return {name: content for name, content in contents(folder).items()
            if name.startswith("clips/") and ".part/" not in name}


def n_files(folder):
    """How many there are, also while they come and go."""
    return sum(len(files) for _, _, files in os.walk(folder))


def listed(folder):
    """The clips in the manifest, {clip: row}."""
    rows = json.loads((folder / "manifest.json").read_text())["clips"]
    return {row["clip"]: row for row in rows}


def load(clip):
    return {file.stem: np.load(file) for file in clip.glob("*.npy")}


@pytest.fixture(scope="session")
def prepared(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    process = start(videos, folder)
    stderr = process.stderr.read()
    assert process.wait() == 0, stderr
    return folder


# ---------------------------------------------------------------------------------- what is written
def test_frame_and_sound_belong_together_whatever_the_rates(prepared):
    names = {Path(name).name: prepared / "clips" / name for name in listed(prepared)}
    assert sorted(names) == ["12.5.mkv", "24.mp4", "30.mp4", "quiet.mp4", "voice.mp4"]
    for name, seed, lowest in (
            ("30.mp4", 1, 0.8), ("12.5.mkv", 2, 0.8), ("24.mp4", 3, 0.8), ("voice.mp4", 4, 0.98)):
        clip, true = load(names[name]), toy_clip(seed, T)[1]
        n = len(clip["motion"])
        assert T - 2 <= n <= T
        assert clip["audio"].shape == (n, 1, 160)
        assert clip["audio"].dtype == np.float16
        assert clip["identity"].shape == (63,)
        mouth = clip["motion"][5:90, MOUTH]
        fits = [np.corrcoef(mouth, true[5 + k:90 + k, MOUTH])[0, 1] for k in (-2, -1, 0, 1, 2)]
        shift = np.argmax(fits) - 2
        assert abs(shift) <= (name == "12.5.mkv"), (name, fits)
        assert fits[2] > lowest, (name, fits)


def test_the_identity_is_the_mean_of_all_frames(prepared):
    clip = load(prepared / "clips/late/voice.mp4")
    keypoints = brightness(clip["motion"][:, MOUTH])           # as the stand-in has it
    assert np.allclose(clip["identity"], keypoints.mean(), atol=1e-4)


def test_sound_that_starts_late_stays_in_step_with_the_picture(tmp_path):
    a, b = tmp_path / "a.mkv", tmp_path / "b.mkv"
    video(a, 1, sound=["-c:a", "pcm_s16le"])
    ffmpeg("-i", a, "-itsoffset", "0.4", "-i", a, "-map", "0:v", "-map", "1:a", "-c", "copy", b)
    early, late = data.load_audio(a), data.load_audio(b)
    assert len(late) == len(early) + 10 * FRAME
    assert not late[:10 * FRAME].any()
    assert np.array_equal(late[10 * FRAME:], early)


def test_a_window_is_what_lies_on_disk(prepared):
    clips, clip = Clips(prepared, ""), load(prepared / "clips/angry/30.mp4")
    k = clips.names.index(prepared / "clips/angry/30.mp4")
    window = clips[clips.first[k] + 7]
    assert window["emotion"] == 0
    assert np.array_equal(window["prev"], clip["motion"][7])
    assert np.array_equal(window["motion"], clip["motion"][8:88])
    assert np.array_equal(window["audio"], clip["audio"][8:88].astype(np.float32))
    assert np.array_equal(window["identity"], clip["identity"])


def test_the_manifest_lists_lengths_splits_and_the_statistics_of_the_training_clips(prepared):
    rows, clips = listed(prepared), Clips(prepared)
    splits = [row["split"] for row in rows.values()]
    assert splits.count("val") == len(Clips(prepared, "val").lengths) >= 1
    assert splits.count("train") == len(clips.lengths) >= 1
    for name, row in rows.items():
        assert row["frames"] == len(load(prepared / "clips" / name)["motion"])
    motion = np.concatenate([load(folder)["motion"] for folder in clips.names]).astype(float)
    assert np.allclose(clips.moments, [motion.mean(0), motion.std(0)], atol=1e-6)
    assert clips.audio_shape == (1, 160)


def test_the_network_sees_the_crop_at_25_frames_per_second(tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    path = tmp_path / "v/a.mp4"
    pattern = "-f lavfi -i testsrc2=s=640x480:r=25 -f lavfi -i sine=f=300 -t 0.24 -crf 5"
    ffmpeg(*pattern.split(), path)
    frame = Image.fromarray(imageio.get_reader(path).get_data(3))
    for crop in "", "101,11,300":
        shown = torch.cat(list(data.pictures(path, crop)))
        x, y, size = crop_box(frame, crop)
        square = frame.crop((x, y, x + size, y + size)).resize((256, 256), Image.BOX)
        apart = np.abs(shown.numpy().astype(float) - np.asarray(square)).mean((1, 2, 3))
        assert len(shown) == 6
        assert apart.argmin() == 3
        assert apart[3] < 4                                    # grey levels

    def M(images):                                             # what it puts out are pixels
        widths = dict(exp=63, kp=63, scale=1, t=3, pitch=66, yaw=66, roll=66)
        return {name: 9 * images[:, 0, 30 * k, 50:50 + n]
                for k, (name, n) in enumerate(widths.items())}
    face = types.SimpleNamespace(device="cpu", M=M)
    monkeypatch.setattr(data, "LivePortrait", lambda *args: face)
    monkeypatch.setattr(Clips, "frames", 4)
    prepare(tmp_path / "v", tmp_path / "set", f"--crop={crop}")
    clip, heads = load(tmp_path / "set/clips/a.mp4"), M(shown.movedim(-1, 1) / 255)
    assert np.allclose(clip["motion"], to_motion(heads), atol=1e-3)
    assert np.allclose(clip["identity"], heads["kp"].mean(0), atol=1e-3)


def test_features_of_an_encoder_are_those_of_the_whole_clip(
        stand_in, videos, tmp_path, monkeypatch):
    def blocks(pieces):
        wav, = pieces
        assert wav.dtype == np.float32
        assert len(wav) % FRAME == 0
        yield torch.from_numpy(wav).view(-1, 1, FRAME)[..., :6].repeat(1, 3, 1)

    def infinite(pieces):
        return [torch.full((len(pieces[0]) // FRAME, 1, 2), 1e6)]        # float16 ends at 65504
    (tmp_path / "v").mkdir()
    shutil.copy(videos / "24.mp4", tmp_path / "v")
    monkeypatch.setattr(data, "feature_blocks", lambda encoder, device: blocks)
    prepare(tmp_path / "v", tmp_path / "set", "--audio_encoder=hubert")
    assert Clips(tmp_path / "set").audio_shape == (3, 6)
    monkeypatch.setattr(data, "feature_blocks", lambda encoder, device: infinite)
    with pytest.raises(ValueError, match="none of its"):
        prepare(tmp_path / "v", tmp_path / "large", "--audio_encoder=hubert")


@pytest.fixture
def published(tmp_path):
    """Videos as they lie on disks: pieces of long ones (HDTF), sound apart (CelebV-Text), folders of
    actors, views and emotions (MEAD), to which a link leads."""
    for folder in "hdtf", "celeb/videos", "celeb/audios", "mead":
        (tmp_path / folder).mkdir(parents=True)
    whole = tmp_path / "hdtf/WDA_Ann0.mp4"
    video(whole, 1)
    ffmpeg("-i", whole, "-an", "-c", "copy", tmp_path / "celeb/videos/a_1.mp4")
    ffmpeg("-i", whole, "-vn", tmp_path / "celeb/audios/a_1.wav")
    for actor in "M003", "W011":
        picture = tmp_path / "actors" / actor / "video/front/angry/level_1/001.MTS"
        picture.parent.mkdir(parents=True)
        ffmpeg("-i", whole, "-f", "mpegts", picture)
    (tmp_path / "mead/linked").symlink_to(tmp_path / "actors")
    (tmp_path / "actors/W011/back").symlink_to(tmp_path / "actors")    # a circle
    return tmp_path


def test_the_table_tool_finds_sounds_that_lie_apart_and_speakers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent / "tools")
    import table
    for file in ["celeb/videos/a b_3.mp4", "celeb/audios/a b_3.m4a", "celeb/videos/c_1.mp4",
                 "mead/M003/video/front/angry/level_1/001.mp4",
                 "mead/M003/audio/angry/level_1/001.m4a",
                 "any/video/x.mp4", "any/audio/x.wav", "any/video/y.mov"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    folders = dict(celebv="celeb", mead="mead", videos="any")
    table.main([f"--{flag}={tmp_path}/{name}" for flag, name in folders.items()])
    printed = capsys.readouterr()
    found = {}
    for row in csv.DictReader(printed.out.splitlines()):
        found[Path(row["video"]).name] = Path(row["audio"]).name, row["emotion"], row["speaker"]
    assert found == {"a b_3.mp4": ("a b_3.m4a", "", "a b"), "c_1.mp4": ("", "", "c"),
                     "001.mp4": ("001.m4a", "angry", "M003"),
                     "x.mp4": ("x.wav", "none", "x"), "y.mov": ("", "none", "y")}
    assert "1 of CelebV-Text's sounds are missing" in printed.err


def test_published_layouts_become_one_set(stand_in, published, monkeypatch):
    monkeypatch.setattr(Clips, "frames", 20)
    (published / "clips.csv").write_text(
        "video,audio,start,end,crop,emotion,speaker\n"
        "hdtf/WDA_Ann0.mp4,,0,1.5,\"0,0,48\",Happy,Ann\n"
        "hdtf/WDA_Ann0.mp4,,1.5,,\"8,0,40\",,Ann\n"
        ",,,,,,\n"
        "celeb/videos/a_1.mp4,celeb/audios/a_1.wav,,,,sad,a\n"
        "./hdtf/../celeb/videos/a_1.mp4,hdtf/WDA_Ann0.mp4,,,,,b\n")
    folder = published / "set"
    prepare(published, folder, f"--clips={published}/clips.csv")
    before = listed(folder)
    assert {name: (row["emotion"], row["speaker"]) for name, row in before.items()} == {
        "celeb/videos/a_1.mp4": (6, "a"),
        "hdtf/up/celeb/videos/a_1.mp4": (8, "b"),
        "hdtf/WDA_Ann0.mp4#t=0,1.5@0,0,48": (4, "Ann"),
        "hdtf/WDA_Ann0.mp4#t=1.5,99999@8,0,40": (8, "Ann")}
    (published / "labels.csv").write_text("clip,emotion\nW011,Fear\n")
    prepare(published / "mead/linked", folder, f"--labels={published}/labels.csv")
    rows = listed(folder)
    assert rows.items() >= before.items()                      # nobody has moved
    mead = {name: (row["emotion"], row["speaker"])
            for name, row in rows.items() if name not in before}
    assert mead == {"M003/video/front/angry/level_1/001.MTS": (0, "m003"),
                    "W011/video/front/angry/level_1/001.MTS": (3, "w011")}
    whole = load(folder / "clips/celeb/videos/a_1.mp4")
    for name in "celeb/videos/a_1.mp4", *mead:
        assert abs(len(load(folder / "clips" / name)["motion"]) - T) <= 1
    later = load(folder / "clips/hdtf/WDA_Ann0.mp4#t=1.5,99999@8,0,40")
    # 1.5 s is the middle of frame 37, so the cut's first frame shows frame 38 already
    assert np.allclose(later["motion"][1:50, MOUTH], whole["motion"][38:87, MOUTH], atol=0.02)
    speakers = [{row["speaker"] for row in rows.values() if row["split"] == split}
                for split in ("train", "val")]
    assert all(speakers) and not set.intersection(*speakers)


def test_videos_are_shown_upright_whatever_their_pixels(tmp_path):
    """A disc stays a disc where pixels are no squares, also in a picture that lies on its side."""
    disc = "geq=lum='255*lte(hypot(X-80,2*(Y-40)),40)':cb=128:cr=128"      # in pixels 1 x 2
    picture = f"-f lavfi -i color=s=160x80:r=25 -vf {disc},setsar=1/2 -t 0.2"
    ffmpeg(*picture.split(), tmp_path / "a.mp4")
    ffmpeg(*"-display_rotation 90 -i".split(), tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    for name in "a.mp4", "b.mp4":
        shown = next(data.pictures(tmp_path / name, ""))[0, ..., 0].numpy() > 128
        height, width = np.ptp(np.nonzero(shown), axis=1)
        assert abs(height - width) <= 4 and width > 100, (name, height, width)


def test_any_number_of_videos_can_be_prepared(stand_in, tmp_path, monkeypatch):
    """Clips are looked at one after the other: a process may open a thousand files or so."""
    monkeypatch.setattr(data, "extract", still)
    (tmp_path / "v").mkdir()
    for k in range(60):
        (tmp_path / f"v/{k}.mp4").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 20, hard))
    try:
        prepare(tmp_path / "v", tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(Clips(tmp_path / "set", "").lengths) == 60


def test_no_speaker_is_in_both_splits_and_none_moves(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "extract", still)
    before = {}
    for n in 2, 10, 60:                                        # speakers: 0, 7, 14 ..
        for k in range(n):
            folder = tmp_path / f"v/{7 * k % 60}/front"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "a.mp4").touch()
            (folder / f"{n}.mp4").touch()
        prepare(tmp_path / "v", tmp_path / "set")
        splits = {name: row["split"] for name, row in listed(tmp_path / "set").items()}
        assert before.items() <= splits.items()
        speakers = {(name.split("/")[0], split) for name, split in splits.items()}
        assert len(speakers) == n
        assert {split for _, split in speakers} == {"train", "val"}
        before = splits
    assert sum(split == "val" for _, split in speakers) < 10


# -------------------------------------------------------------------------------- runs that are cut
def test_killed_processes_that_share_the_work_go_on_and_end_in_the_same_bytes(
        videos, prepared, tmp_path):
    rng, folder = random.Random(7), tmp_path / "set"
    for n in 2, 12:                                            # files: in the first, third clip
        both = start_both(videos, folder)
        while both[0].poll() is None and n_files(folder) < n:
            time.sleep(0.002)
        time.sleep(0.1 * rng.random())
        for process in both:
            process.send_signal(signal.SIGKILL)
        for process in both:
            process.stderr.read()                              # its ffmpeg has ended too
        assert complete(folder).items() <= complete(prepared).items()
    for process in start_both(videos, folder):
        stderr = process.stderr.read()
        assert process.wait() == 0, stderr
    assert contents(folder) == contents(prepared)


def test_a_full_disk_is_one_line_and_a_second_run_completes_the_set(
        stand_in, videos, prepared, tmp_path):
    folder = tmp_path / "set"
    process = start(videos, folder, largest=30_000)            # the audio of a clip: 32 kB
    stderr = process.stderr.read()
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert process.wait() == 1
    assert len(errors) == 1
    assert "audio.npy: could not be saved" in errors[0]
    assert "Traceback" not in stderr
    assert not complete(folder)
    prepare(videos, folder)
    assert contents(folder) == contents(prepared)


def test_other_networks_or_crops_than_those_begun_with_are_refused_other_places_are_not(
        stand_in, videos, prepared, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(prepared, folder)
    before = complete(folder)
    with pytest.raises(ValueError, match="begun with other settings.*'crop': ''"):
        prepare(videos, folder, "--crop=0,0,32")
    weights = tmp_path / "other/base_models"
    weights.mkdir(parents=True)
    (weights / "motion_extractor.pth").write_text("another network")
    with pytest.raises(ValueError, match="begun with other settings"):
        prepare(videos, folder, f"--weights={tmp_path}/other")
    (tmp_path / "elsewhere").symlink_to(videos)
    prepare(tmp_path / "elsewhere", folder, f"--weights={tmp_path}/nowhere")
    assert complete(folder) == before


# --------------------------------------------------------------------------------- what is refused
def test_bad_videos_are_named_and_harm_no_other(stand_in, tmp_path, capsys):
    root = tmp_path / "videos"
    root.mkdir()
    good = root / "good.mp4"
    video(good, 1)
    video(root / "short.mp4", 2, frames=7)
    video(root / "8k.mkv", 3, sound="-ar 8000 -c:a pcm_s16le".split())
    video(root / "96k.mkv", 4, sound="-ar 96000 -c:a pcm_s16le".split())
    video(root / "six.mkv", 5, sound="-ac 6 -c:a flac".split())
    ffmpeg("-i", good, "-an", "-c", "copy", root / "mute.mp4")
    ffmpeg("-i", good, "-vn", "-c", "copy", root / "blind.mp4")
    ffmpeg("-i", good, "-t", "0", "-c", "copy", root / "none.mkv")
    pattern = "-f lavfi -i testsrc2=s=320x240:r=25 -f lavfi -i sine -t 6 -movflags faststart"
    ffmpeg(*pattern.split(), root / "cut.mp4")
    (root / "cut.mp4").write_bytes((root / "cut.mp4").read_bytes()[:150_000])
    (root / "moov.mp4").write_bytes(good.read_bytes()[:3000])
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.avi").write_text("no video at all")
    (root / os.fsdecode(b"\xff.mp4")).write_text("a name that is no UTF-8")
    sys.stdout.reconfigure(errors="backslashreplace")          # as data.run does
    prepare(root, tmp_path / "set")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "4 clips; 9 left out" in first
    reasons = {Path(line.split(": ")[0]).name: line for line in lines}
    assert sorted(reasons) == ["\\udcff.mp4", "blind.mp4", "cut.mp4", "empty.mp4", "moov.mp4",
                               "mute.mp4", "none.mkv", "short.mp4", "text.avi"]
    assert "no picture" in reasons["blind.mp4"]
    assert "no picture" in reasons["cut.mp4"]
    assert "no sound" in reasons["mute.mp4"]
    assert "7 frames" in reasons["short.mp4"]
    assert len(Clips(tmp_path / "set", "").lengths) == 4
    assert len(complete(tmp_path / "set")) == 4 * 4 + 9 == len(contents(tmp_path / "set")) - 1
    manifest = (tmp_path / "set/manifest.json").read_bytes()
    assert len(json.loads(manifest)["left_out"]) == 9
    shutil.copy(good, root / "text.avi")                       # left out before: not tried again
    prepare(root, tmp_path / "set")
    assert (tmp_path / "set/manifest.json").read_bytes() == manifest
    (tmp_path / "set/clips/text.avi").unlink()
    prepare(root, tmp_path / "set")
    assert "5 clips; 8 left out" in capsys.readouterr().out
    (tmp_path / "more").mkdir()
    shutil.copy(good, tmp_path / "more/z.mp4")                 # what was left out is not forgotten
    prepare(tmp_path / "more", tmp_path / "set")
    assert "6 clips; 8 left out" in capsys.readouterr().out


def test_a_clip_that_fails_half_way_leaves_nothing_but_the_reason(stand_in, tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").touch()
    nan = torch.full((90, 1, 160), torch.nan).half()
    monkeypatch.setattr(data, "extract", lambda *args: still(*args) | dict(audio=[nan]))
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(tmp_path / "v", tmp_path / "set")
    left, = (tmp_path / "set/clips").iterdir()
    assert left.name == "a.mp4" and "holds NaN" in left.read_text()


def test_nothing_usable_is_one_error(stand_in, tmp_path, videos):
    root = tmp_path / "v"
    with pytest.raises(ValueError, match="no videos there"):
        prepare(tmp_path / "nowhere", tmp_path / "set")
    root.mkdir()
    (root / "x.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(root, tmp_path / "set")
    with pytest.raises(ValueError, match="no train clips"):
        Clips(tmp_path / "set")
    shutil.copy(videos / "24.mp4", root / "x.mp4")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(root, tmp_path / "other", "--crop=0,0,49")
    (tmp_path / "clips.csv").write_text("video,crop\nx.mp4,\"-8,0,40\"\n")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        prepare(root, tmp_path / "third", f"--clips={tmp_path}/clips.csv")


def test_a_flag_that_makes_no_sense_is_named(stand_in, tmp_path, videos):
    with pytest.raises(UsageError, match="--crop"):
        prepare(videos, tmp_path / "set", "--crop=1,2")
    assert not (tmp_path / "set").exists()


# ------------------------------------------------------------------------------ emotions, the check
@pytest.fixture
def emotions(stand_in, videos, tmp_path):
    """Prepares the videos with some flags -> {clip: emotion}."""
    folders = iter(range(9))

    def of(*flags):
        folder = tmp_path / f"set{next(folders)}"
        prepare(videos, folder, *flags)
        return {name: row["emotion"] for name, row in listed(folder).items()}
    return of


def test_labels_come_from_a_table_or_a_folder(emotions, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("clip,emotion\n24,Surprised\n./LATE/voice.mp4,contempt\n")
    assert emotions(f"--labels={table}") == {
        "24.mp4": 7, "late/voice.mp4": 1, "angry/30.mp4": 0, "quiet.mp4": 8,
        "it's: a né dir/12.5.mkv": 8}


def test_the_nearest_name_labels_in_any_case_but_a_video_is_not_labelled_by_its_own(tmp_path):
    (tmp_path / "labels.csv").write_text("clip,emotion\nm003,disgust\n")
    for row, emotion in (
            ("sad/Angry/1.mp4,", 0), ("happy.mp4,", 8), ("sad/Happy.MTS,", 6), ("FEAR/sad/1,", 6),
            ("M003/front/angry/1.mp4,", 2), ("sad/1.mp4,Surprised", 7), ("clip.mp4,", 8)):
        (tmp_path / "clips.csv").write_text(f"video,emotion\n{row}\n")
        settings = data.Settings(clips=tmp_path / "clips.csv", labels=tmp_path / "labels.csv")
        clip, = data.find_clips(settings).values()
        assert clip["emotion"] == emotion, row


def test_every_clip_lies_in_the_data_set_wherever_its_video_is(tmp_path):
    videos = "a.mp4", "../a.mp4", "sub/../../../b.mp4", "/c.mp4", "./d.mp4", "x/../e.mp4"
    (tmp_path / "clips.csv").write_text("\n".join(["video", *videos]))
    clips = data.find_clips(data.Settings(clips=tmp_path / "clips.csv", videos="v"))
    assert [*clips] == ["a.mp4", "up/a.mp4", "sub/up/up/up/b.mp4", "c.mp4", "d.mp4", "x/up/e.mp4"]


@pytest.mark.parametrize("text", [
    b"clip,emotion\n24,furious\n", b"24,happy\n25,sad\n", b"clip,emotion\n24\n",
    b"\xff\xfe\x00\x81", None])
def test_a_table_of_labels_that_cannot_be_used_is_named(emotions, tmp_path, text):
    if text is not None:
        (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(ValueError, match="labels.csv: cannot be used"):
        emotions(f"--labels={tmp_path}/labels.csv")


def test_the_classifiers_table_labels_what_no_folder_does(
        emotions, videos, tmp_path, monkeypatch, capsys):
    class HSEmotionRecognizer:                                 # as in hsemotion-onnx 0.3.1
        def __init__(self, name):
            pass

        def predict_emotions(self, image, logits=True):
            assert image.shape == (256, 256, 3)
            assert image.dtype == np.uint8
            return "Sadness", np.eye(8)[6]
    module = types.SimpleNamespace(HSEmotionRecognizer=HSEmotionRecognizer)
    package = types.SimpleNamespace(facial_emotions=module)
    monkeypatch.setitem(sys.modules, "hsemotion_onnx", package)
    monkeypatch.setitem(sys.modules, "hsemotion_onnx.facial_emotions", module)
    tool = runpy.run_path(HERE / "tools/hsemotion.py")
    tool["main"]([f"--videos={videos}"])
    (tmp_path / "clips.csv").write_text(capsys.readouterr().out)
    labels = emotions(f"--clips={tmp_path}/clips.csv")
    assert labels["24.mp4"] == 6
    assert labels["late/voice.mp4"] == 6
    assert labels["angry/30.mp4"] == 0


def test_the_check_finds_the_shifted_soundtrack(prepared, tmp_path, capsys):
    tool = runpy.run_path(HERE / "tools/check.py")
    (tmp_path / "labels.csv").write_text("clip,emotion\nLATE,fear\n25,sad\n")
    tool["main"]([f"--data_dir={prepared}", f"--labels={tmp_path}/labels.csv", "--report="])
    out = capsys.readouterr().out
    for words in "5 clips", "anger 1, ", "none 4", "-2.3407 +-  8.8819", "24.mp4: no emotion", \
            "labels.csv: no clip is called 25\n":
        assert words in out
    assert "called late" not in out
    odd = [line for line in out.splitlines() if ".mp4: voice" in line or "jumps" in line]
    assert len(odd) == 1
    assert "voice.mp4: voice +8 frames after the lips" in odd[0]
    pytest.importorskip("matplotlib")
    tool["draw"](tmp_path / "report.png", *tool["check"](prepared))
    assert Image.open(tmp_path / "report.png").width > 1000


def test_training_takes_the_prepared_set(prepared, tmp_path):
    flags = "--steps=3 --batch_size=2 --width=32 --workers=1".split()
    train.main([f"--data_dir={prepared}", f"--out_dir={tmp_path}", *flags])
    with open(tmp_path / "log.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
