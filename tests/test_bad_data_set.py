"""A damaged data set is one line that names what is damaged: the manifest when it is opened, a clip
when a window of it is read. Few damaged windows are passed over."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import data
from bad import (FLAGS, Code, change_manifest, cut, folder, good, preparable, refused, run,
                 write)

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = "set/clips/1"
NO_CLIPS = "set/manifest.json: no train clips there"


def change_rows(**values):
    """Set entries of every clip in the manifest."""
    rows = json.loads(Path("set/manifest.json").read_text())["clips"]
    change_manifest(clips=[row | values for row in rows])


def change_clip(name, change):
    """Replace an array of the second clip by what `change` makes of it."""
    path = f"{CLIP}/{name}.npy"
    np.save(path, change(np.load(path)))


# ------------------------------------------------------------------------------------ the manifest
def test_no_data_set(refused):
    words = "nowhere/manifest.json: no train clips there"
    refused("train --data_dir=nowhere", words, "prepare a data set: data.py --videos=DIR")


def test_a_file_as_data_set(refused):
    refused("train --data_dir=text.txt", "text.txt/manifest.json: no train clips there")


@pytest.mark.parametrize("content", ["", "x", "[]", "{}", '{"settings": {}}'])
def test_a_manifest_without_clips(refused, content):
    write("set/manifest.json", content)
    refused("train", NO_CLIPS)


def test_a_manifest_of_no_clips(refused):
    change_manifest(clips=[])
    refused("train", NO_CLIPS, "(none is listed")


def test_a_manifest_of_validation_only(refused):
    change_rows(split="val")
    refused("train", NO_CLIPS, "(none is listed")


def test_rows_without_a_split(refused):
    change_manifest(clips=[dict(clip="0", frames=90, emotion=8)])
    refused("train", NO_CLIPS, "('split')")


def test_rows_that_are_numbers(refused):
    change_manifest(clips=[7])
    refused("train", NO_CLIPS)


def test_a_clip_of_unknown_length(refused):
    change_rows(frames="many")
    refused("train", NO_CLIPS)


def test_a_manifest_without_moments(refused):
    write("set/manifest.json", '{"clips": []}')
    refused("check", "set/manifest.json: no clips there")


@pytest.mark.parametrize("audio_shape", [None, [160], [1, 160, 1], ["one", "160"]])
def test_features_of_another_shape(refused, audio_shape):
    change_manifest(audio_shape=audio_shape)
    refused("train", NO_CLIPS)


def test_clips_too_short_for_a_window(refused):
    change_rows(frames=80)
    refused("train", NO_CLIPS)


def test_moments_of_another_shape(refused):
    change_manifest(moments=[[1] * 7] * 2)
    refused("train", NO_CLIPS)


# --------------------------------------------------------------------------------------- the clips
def missing():
    shutil.rmtree(CLIP)


def missing_sound():
    Path(f"{CLIP}/audio.npy").unlink()


def cut_short():
    cut(f"{CLIP}/motion.npy", 5000)


def empty():
    write(f"{CLIP}/motion.npy", b"")


def with_code():
    write(f"{CLIP}/audio.npy", Code())


def with_a_pickle():
    np.save(f"{CLIP}/audio.npy", np.array([Code()]), allow_pickle=True)


def short_motion():
    change_clip("motion", lambda motion: motion[:50])


def short_sound():
    change_clip("audio", lambda audio: audio[:20])


def another_encoder():
    change_clip("audio", lambda audio: audio.repeat(12, 1))


def of_69_numbers():
    change_clip("motion", lambda motion: motion[:, 1:])


def of_20_keypoints():
    change_clip("identity", lambda identity: identity[3:])


def with_nan():
    change_clip("motion", lambda motion: motion + np.nan)


def with_infinity():
    change_clip("audio", lambda audio: audio + np.inf)


DAMAGES = [missing, missing_sound, cut_short, empty, with_code, with_a_pickle, short_motion,
           short_sound, another_encoder, of_69_numbers, of_20_keypoints, with_nan, with_infinity]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_training_set_of_which_half_is_damaged(refused, damage):
    damage()
    refused("train", CLIP, "cannot be used", "prepare the data again")


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_else_to_read(refused, damage):
    damage()
    shutil.rmtree("set/clips/0")
    refused("train", "set/clips/", "cannot be used", "prepare the data again")


@pytest.mark.parametrize("damage", [missing, missing_sound, cut_short, empty, with_a_pickle])
def test_a_damaged_clip_in_the_look_at_a_data_set(refused, damage):
    damage()
    refused("check", CLIP)


def test_the_expert_learns_from_no_damaged_set_either(refused):
    with_nan()
    refused("train --model=alse", CLIP, "not finite")


def test_more_threads_report_alike(refused):
    missing()
    refused("train --workers=3", CLIP, "cannot be used", "prepare the data again")


def test_few_damaged_windows_are_passed_over(run):
    rng = np.random.default_rng(0)
    n = 20_000
    motion = rng.standard_normal((n, 70), np.float32)
    motion[n // 2] = np.nan                        # 81 of 20,000 windows hold this frame
    np.save(f"{CLIP}/motion.npy", motion)
    np.save(f"{CLIP}/audio.npy", np.zeros((n, 1, 160), np.float16))
    row = dict(clip="1", frames=n, emotion=8, split="train")
    change_manifest(clips=[row])
    code, lines = run("train --steps=25 --batch_size=8 --seed=3")
    assert code == 0
    assert 1 <= len(lines) <= 2
    assert all(line.startswith(f"passed over: {CLIP}") for line in lines)


# ------------------------------------------------------------------------------------- preparation
@pytest.mark.parametrize("root", ["nowhere", "text.txt"])
def test_no_videos(refused, root):
    refused(f"prepare --videos={root}", f"{root}: no videos there; looked for 3gp")


def test_no_table_of_labels(refused):
    refused("prepare --labels=nowhere.csv", "nowhere.csv: cannot be used", "No such file")


@pytest.mark.parametrize("flag", ["labels", "clips"])
def test_a_table_in_another_encoding(refused, flag):
    write("table.csv", "video,clip,emotion\n".encode("utf-16"))
    words = "table.csv: cannot be used", "should be CSV, in UTF-8"
    refused(f"prepare --{flag}=table.csv", *words)


def test_an_emotion_that_is_not_known(refused):
    write("labels.csv", "clip,emotion\n1,glee")
    words = "labels.csv: cannot be used; expected lines", "anger contempt", "('glee')"
    refused("prepare --labels=labels.csv", *words)


def test_a_preparation_without_weights(refused):
    words = "lp/base_models/appearance_feature_extractor.pth: not a readable checkpoint"
    refused("prepare", words, "hf download KwaiVGI/LivePortrait")


def test_a_data_set_prepared_with_other_settings(refused, preparable):
    words = "set/manifest.json: begun with other settings"
    refused("prepare --data_dir=set", words, "use another --data_dir")


@pytest.mark.parametrize("size", [0, 500])
def test_a_damaged_clip_is_left_out_of_a_second_preparation(run, preparable, capfd, size):
    write("videos/second.mp4", "another video")
    assert run("prepare") == (0, [])
    cut("new/clips/second.mp4/motion.npy", size)
    data.main(FLAGS["prepare"].split())
    printed = capfd.readouterr().out
    assert "new: 1 clips; 1 left out" in printed
    assert "new/clips/second.mp4: " in printed and "prepare the data again" in printed
