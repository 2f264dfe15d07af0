"""A flag that makes no sense is one line and exit code 2; a request that no sampler can answer, and
a place that cannot be written to, are one line and exit code 1. No file is harmed."""
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from bad import Code, folder, good, refused, run, write
from build import ffmpeg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("command, words", [
    ("sample --stepz=3", "unknown flag --stepz=3; known: --audio_path, --output_path"),
    ("sample steps=3", "unknown flag steps=3"),
    ("sample --", "unknown flag --"),
    ("sample --bench", "unknown flag --bench"),
    ("sample --relative", "unknown flag --relative"),
    ("sample --absolute", "unknown flag --absolute"),
    ("train --fusion=c2f", "unknown flag --fusion=c2f")])
def test_an_unknown_flag(refused, command, words):
    refused(command, words, code=2)


@pytest.mark.parametrize("command, kind", [
    ("sample --steps=1.5", "int"),
    ("sample --steps=", "int"),
    ("sample --steps=many", "int"),
    ("sample --seed=1000000000000000000000", "int"),
    ("sample --steps=9223372036854775807", "int"),
    ("sample --cfg_audio=nan", "float"),
    ("sample --cfg_emotion=much", "float"),
    ("sample --latency=inf", "float"),
    ("sample --smooth=maybe", "bool"),
    ("train --steps=1e3", "int"),
    ("train --seed=1000000000000000000000", "int"),
    ("train --learning_rate=nan", "float"),
    ("train --tau=inf", "float"),
    ("train --p_drop_audio=nan", "float"),
    ("train --bf16=yes", "bool")])
def test_a_value_of_the_wrong_type(refused, command, kind):
    flag = command.split()[1]
    name = flag.split("=")[0]
    refused(command, f"{flag}: expected {kind}, as in {name}=", code=2)


@pytest.mark.parametrize("command, words", [
    ("train --steps=0", "--steps=0: should be at least 1, at most inf"),
    ("train --batch_size=-2", "--batch_size=-2: should be at least 1, at most inf"),
    ("train --width=0", "--width=0: should be at least 1, at most inf"),
    ("train --chunk=16", "--chunk=16: should be at least 17"),
    ("train --reflow=ckpt.pt --straight=False", "--straight has an effect only without --reflow"),
    ("train --warmup=-1", "--warmup=-1: should be at least 0, at most inf"),
    ("train --learning_rate=-1", "--learning_rate=-1.0: should be at least 0, at most inf"),
    ("train --workers=0", "--workers=0: should be at least 1, at most inf"),
    ("train --p_drop_audio=50", "--p_drop_audio=50.0: should be at least 0, at most 1"),
    ("train --p_drop_emotion=1.1", "--p_drop_emotion=1.1: should be at least 0, at most 1"),
    ("train --ema=5", "--ema=5.0: should be at least 0, at most 1"),
    ("train --cooldown=200", "--cooldown=200.0: should be at least 0, at most 1"),
    ("train --model=alse --batch_size=3", "--batch_size=3: should be a multiple of 2")])
def test_a_number_out_of_range(refused, command, words):
    refused(command, words, code=2)


@pytest.mark.parametrize("command, words", [
    ("sample --emotion=glee", "--emotion=glee: 'glee'? known are anger"),
    ("sample --emotion=9", "--emotion=9: '9'? known are anger"),
    ("sample --emotion=", "--emotion=: ''? known are anger"),
    ("sample --motion=sideways", "--motion=sideways: should be relative or absolute"),
    ("pairs --pairs=p.csv --output_path=old --motion=sideways", "--motion=sideways: should be"),
    ("train --preset=huge", "--preset=huge: known are toy, moda"),
    ("train --model=gan --heads=1", "--model=gan: known are moda, alse")])
def test_a_name_that_is_not_known(refused, command, words):
    refused(command, words, code=2)


@pytest.mark.parametrize("number", ["long", "nan", "inf", "-5", "0", "1e9"])
def test_seconds_of_an_emotion_that_are_none(refused, number):
    words = f"'happiness:{number}'? known are anger", "seconds above 0, below 40000"
    refused(f"sample --emotion=neutral,happiness:{number}", *words, code=2)


def test_names_are_read_in_any_case(run):
    assert run("sample --emotion=Neutral:1,HAPPINESS") == (0, [])


@pytest.mark.parametrize("command, words", [
    ("sample --crop=0,0,32", "--crop has an effect only with --weights"),
    ("sample --compile", "--compile has an effect only with --weights"),
    ("sample --paste_back", "--paste_back has an effect only with --weights"),
    ("sample --alse=expert.pt", "--alse has an effect only with --eval"),
    ("sample --eval", "--audio_path has an effect only without --eval"),
    ("sample --latency=1 --audio_encoder=hubert", "--latency has an effect only without"),
    ("play --motion_path=m.npy --seed=2", "--seed has an effect only without --motion_path"),
    ("play --motion_path=m.npy --emotion=fear", "--emotion has an effect only without"),
    ("play --motion_path=m.npy --cfg_audio=2", "--cfg_audio has an effect only without"),
    ("pairs --pairs=p.csv --emotion=fear", "--emotion has an effect only without --pairs"),
    ("sample --stats=ckpt.pt", "--stats has no effect: ckpt.pt has statistics of its own"),
    ("sample --latency=1 --chunk=50", "--chunk has an effect only without --latency"),
    ("train --tau=0.3", "--tau has an effect only with --alse"),
    ("resume --stats=mean.pt", "--stats has an effect only without --init_from=resume"),
    ("train --clips=9", "--clips has an effect only without --data_dir"),
    ("train --reflow=ckpt.pt --init_from=old/ckpt.pt",
     "--reflow has an effect only with --init_from=scratch|auto|resume"),
    ("train --model=alse --n_four=2", "--n_four has an effect only with --model=moda"),
    ("train --model=alse --reflow=ckpt.pt", "--reflow has an effect only with --model=moda"),
    ("train --reflow=ckpt.pt --p_drop_audio=0.5", "--p_drop_audio has an effect only without"),
    ("train --reflow=ckpt.pt --cfg_both=0.5", "--cfg_both has an effect only without --reflow")])
def test_a_flag_without_effect(refused, command, words):
    refused(command, words, code=2)


@pytest.mark.parametrize("command", ["sample", "train", "prepare"])
@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(refused, command, device):
    words = f"--device={device}: no such device here"
    refused(f"{command} --device={device}", words, code=2)


@pytest.mark.parametrize("command, words", [
    ("sample --audio_path=", "--audio_path=: which voice? a file"),
    ("play --audio_path=- --motion_path=m.npy", "not with --motion_path"),
    ("sample --image_path=me.png", "--weights and --image_path go together"),
    ("sample --weights=videos", "--weights and --image_path go together"),
    ("check --data_dir=", "needed: --data_dir=FOLDER"),
    ("prepare --videos=", "needed: --videos=FOLDER --data_dir=FOLDER"),
    ("prepare --data_dir=", "needed: --videos=FOLDER --data_dir=FOLDER"),
    ("pairs --pairs=pairs.csv", "--pairs: into which folder? --output_path=FOLDER"),
    ("prepare --crop=1,2", "--crop=1,2: should be --crop=x,y,size in pixels"),
    ("prepare --crop=-1,0,32", "--crop=-1,0,32: should be --crop=x,y,size in pixels")])
def test_flags_that_do_not_go_together(refused, command, words):
    refused(command, words, code=2)


# ------------------------------------------------------------------------------ where to write to
@pytest.mark.parametrize("flag", [
    "--output_path=video", "--output_path=", "--output_path=nowhere/video.mp4",
    "--output_path=/dev/full", "--output_path=voice.wav", "--output_path=video.gif",
    "--output_path=video.avi", "--output_path=video.nonsense", "--save_motion=nowhere/m.npy",
    "--output_path=old/-", "--output_path=./-", "--save_motion=motion", "--save_motion=-",
    "--save_motion=m.PKL"])
def test_a_place_that_no_video_or_motion_can_have(refused, flag):
    name, place = flag.split("=")
    words = f"{name}={place}: should be a file in an existing folder, and one of"
    refused(f"sample {flag}", words, code=2)


@pytest.mark.parametrize("flag", ["--output_path=new.mp4", "--save_motion=new.npy"])
def test_a_folder_in_the_place_of_a_file_is_seen_before_the_work(refused, flag):
    name, place = flag.split("=")
    Path(place).mkdir()
    refused(f"sample {flag}", f"{name}={place}: should be a file in an existing folder", code=2)
    assert Path(place).is_dir()


@pytest.fixture
def inputs(folder):
    """The folder with a voice in a video, under more than one name, and a portrait and motion."""
    ffmpeg("-i", "voice.wav", "talk.mp4")
    Path("link.mp4").symlink_to("talk.mp4")
    os.link("talk.mp4", "hard.mp4")
    os.link("me.png", "me.mp4")
    os.link("ckpt.pt", "ckpt.pkl")
    np.save("m.npy", np.zeros((5, 70), np.float32))


@pytest.mark.parametrize("command", [
    "sample --audio_path=./talk.mp4 --output_path=talk.mp4",
    "sample --audio_path=talk.mp4 --output_path=../{folder}/talk.mp4",
    "sample --audio_path=talk.mp4 --output_path={parent}/{folder}/talk.mp4",
    "sample --audio_path=link.mp4 --output_path=talk.mp4",
    "sample --audio_path=talk.mp4#t=0,1 --output_path=talk.mp4",
    "sample --audio_path=talk.mp4 --output_path=link.mp4",
    "sample --audio_path=talk.mp4 --output_path=hard.mp4",
    "play --motion_path=./m.npy --save_motion=m.npy",
    "sample --ckpt=./ckpt.pkl --save_motion=ckpt.pkl",
    "sample --stats=./ckpt.pkl --save_motion=ckpt.pkl",
    "portrait --output_path=me.mp4"])
def test_no_output_is_an_input_however_it_is_spelled(inputs, refused, tmp_path, command):
    command = command.format(folder=tmp_path.name, parent=tmp_path.parent)
    refused(command, "would be written over, as ", code=2)


@pytest.mark.parametrize("out", ["text.txt", "text.txt/new"])
def test_a_training_below_a_file(refused, out):
    refused(f"train --out_dir={out}", out)


# ------------------------------------------------------------------------------------ no such work
@pytest.mark.parametrize("flag, words", [
    ("--steps=-3", "steps=-3: should be 1 or more"),
    ("--chunk=0", "< chunk=0"),
    ("--overlap=20", "<= overlap=20 < chunk=20"),
    ("--past=17", "should be 0 <= past=17 <= overlap="),
    ("--overlap=-1", "<= overlap=-1 < chunk=20")])
def test_a_request_that_no_sampler_can_answer(refused, flag, words):
    refused(f"sample {flag}", words)


def test_motion_of_another_length_than_the_voice(refused):
    np.save("m.npy", np.zeros((4, 70), np.float32))
    refused("play --motion_path=m.npy", "m.npy", "its 4 frames are not the 5 of the voice")


def test_motion_that_is_none(refused):
    words = "text.txt: no motion could be read"
    refused("play --motion_path=text.txt", words, "write it by --save_motion")


def template(**changes):
    """The pickle of a motion template of one frame."""
    frame = dict(exp=np.zeros((1, 21, 3)), scale=np.ones((1, 1)), t=np.zeros((1, 3)),
                 R=np.eye(3)[None])
    return pickle.dumps(dict(motion=[frame | changes], n_frames=1, output_fps=25))


@pytest.mark.parametrize("content, words", [
    (None, "No such file"),
    ("portrait,voice,emotion\n".encode("utf-16"), "should be CSV, in UTF-8"),
    (b"portrait,voice,emotion\n,\xff,none\n", "should be CSV, in UTF-8")])
def test_a_table_of_pairs_that_is_none(refused, content, words):
    if content:
        write("pairs.csv", content)
    refused("pairs --pairs=pairs.csv --output_path=old", "pairs.csv: cannot be used", words)


class LyingDtype:
    """A pickled dtype of objects that says that it holds none: numpy would take any bytes for
    pointers."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class LyingArray:
    def __reduce__(self):
        build, given, _ = np.zeros(1).__reduce__()
        return build, given, (1, (3,), LyingDtype(), False, b"12345678" * 3)


@pytest.mark.parametrize("content, words", [
    (template(t=LyingArray()), "m.pkl"),
    (pickle.dumps(Code()), "it holds posix.mkdir, which is no array"),
    (pickle.dumps(dict(motion=[], do=eval)), "it holds builtins.eval, which is no array"),
    (template(exp=np.array([print])), "m.pkl"),
    (template(t=np.array([None] * 3)), "m.pkl"),
    (template(exp=np.zeros((1, 20, 3))), "motion of shape (1, 67)"),
    (template(scale=np.full(1, np.nan)), "should be finite numbers"),
    (template()[:-40], "m.pkl"),
    (pickle.dumps({}), "'motion'"),
    (pickle.dumps("laugh"), "m.pkl"),
    (b"", "m.pkl")])
def test_a_template_that_holds_code_or_no_motion(refused, content, words):
    write("m.pkl", content)
    refused("play --motion_path=m.pkl", "m.pkl: no motion could be read", words)


@pytest.mark.parametrize("command", ["train --width=1000000000000", "sample --chunk=1000000000000"])
def test_more_memory_than_there_is(refused, command):
    refused(command, "memory")
