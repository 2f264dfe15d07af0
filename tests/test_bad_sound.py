"""No sound, or a broken one, is one line and harms no file; what is merely odd becomes a video."""
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import soundfile

import data
import sample
from bad import cut, folder, good, refused, reported, run, start, write
from build import ffmpeg
from data import load_audio

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3000)


def sound(samples, rate=16000, name="voice.wav", **options):
    soundfile.write(name, samples, rate, **options)


def encode(name, n):
    """The first n bytes of the voice in another format."""
    ffmpeg("-i", "voice.wav", name)
    cut(name, n)


# -------------------------------------------------------------------------------------- no sound
@pytest.mark.parametrize("path", [
    "nowhere.wav", "text.txt", "me.png", "videos", "/dev/null", "two\nlines.wav",
    "voice.wav#t=-1,1", "voice.wav#t=1", "voice.wav#t=1,", "voice.wav#t=nan,2", "voice.wav#t=2,1"])
def test_what_is_no_sound_is_named(refused, path):
    name = path.split("\n")[-1]
    refused(f"sample --audio_path={path}", f"{name}: no sound")


def test_an_empty_file(refused):
    write("voice.wav", "")
    refused("sample", "voice.wav: no sound")


def test_a_sound_of_zero_samples(refused):
    sound([])
    refused("sample", "voice.wav: no sound")


def test_a_header_without_a_sound(refused):
    cut("voice.wav", 20)
    refused("sample", "voice.wav: no sound")


def test_a_link_to_itself(refused):
    Path("x.wav").symlink_to("x.wav")
    refused("sample --audio_path=x.wav", "x.wav: no sound")


def test_a_video_without_sound(refused):
    ffmpeg("-loop", "1", "-t", "0.1", "-i", "me.png", "mute.mp4")
    refused("sample --audio_path=mute.mp4", "mute.mp4: no sound")


@pytest.mark.parametrize("name, size", [("v.mp3", 150), ("v.m4a", 900), ("v.ogg", 200)])
def test_a_file_cut_before_its_sound(refused, name, size):
    encode(name, size)
    refused(f"sample --audio_path={name}", f"{name}: no sound")


def test_one_sample_per_second(refused):
    sound([0.1, 0, 0.1], rate=1)
    refused("sample", "voice.wav: no sound")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_sound_of_numbers_that_are_none(refused, number):
    sound([0, number] * 700, subtype="FLOAT")
    refused("sample", "voice.wav: the sound holds NaN or infinite samples")


@pytest.mark.parametrize("span", ["", "#t=0,1"])
def test_a_pipe_is_refused_and_not_waited_for(refused, span):
    os.mkfifo("pipe.wav")
    words = f"pipe.wav{span}: which voice? a file, no pipe"
    refused(f"sample --audio_path=pipe.wav{span}", words, code=2)


def test_a_script_makes_ffmpeg_read_no_other_file(refused):
    shutil.move("voice.wav", "secret.wav")
    write("voice.wav", "ffconcat version 1.0\nfile secret.wav\n")
    refused("sample", "voice.wav: no sound")
    write("voice.wav", "#EXTM3U\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n")
    refused("sample", "voice.wav: no sound")
    with pytest.raises(ValueError, match="no picture"):
        next(data.pictures("voice.wav", ""))


def test_a_machine_without_ffmpeg(refused, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")
    monkeypatch.setattr(data, "get_ffmpeg_exe", missing)
    refused("sample", "No ffmpeg exe could be found.")


def test_an_ffmpeg_that_crashes(refused, tmp_path, monkeypatch):
    crashing = tmp_path / "ffmpeg"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(data, "get_ffmpeg_exe", lambda: str(crashing))
    refused("sample", "voice.wav: no sound could be read (exit -11)")


def test_a_mistake_of_ours_keeps_its_traceback(run, monkeypatch):
    def mistaken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(sample, "make_video", mistaken)
    with pytest.raises(RuntimeError, match="mat1"):
        run("sample")


# -------------------------------------------------------------------------- channels and tracks
def tone(n, frequency):
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(n) / 16000)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_channels_are_mixed_and_written(run, channels):
    sound(np.stack([NOISE] * channels, 1))
    assert run("sample") == (0, [])
    heard = load_audio("video.mp4")[:3000]
    assert np.corrcoef(heard, NOISE[:len(heard)])[0, 1] > 0.8


@pytest.mark.parametrize("channels", [9, 11, 16, 20])
def test_more_channels_than_have_a_place_are_mixed(run, channels):
    sound(np.stack([NOISE, *[0 * NOISE] * (channels - 1)], 1), subtype="FLOAT")
    heard = load_audio("voice.wav")
    assert np.corrcoef(heard, NOISE)[0, 1] > 0.999
    assert run("sample") == (0, [])


@pytest.mark.parametrize("right", [-1, -0.9])
def test_channels_that_cancel_are_reported_and_the_louder_one_counts(run, right, capfd):
    sound(np.stack([NOISE, right * NOISE], 1), subtype="FLOAT")
    assert np.abs(load_audio("voice.wav") - NOISE).max() < 1e-6
    assert "cancel" in capfd.readouterr().err
    code, lines = run("sample")
    assert code == 0
    assert lines == ["voice.wav: its channels cancel; the louder one is taken"]


def test_channels_that_do_not_cancel_are_averaged(folder, capfd):
    left, right = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 3000))
    sound(np.stack([left, right], 1), subtype="FLOAT")
    assert np.abs(load_audio("voice.wav") - (left + right) / 2).max() < 1e-6
    assert not capfd.readouterr().err


@pytest.mark.parametrize("dB, silent", [(-61, True), (-59, False)])
def test_a_voice_that_is_all_but_silent_is_reported(folder, capfd, dB, silent):
    sound(np.full(3000, 10 ** (dB / 20)), subtype="FLOAT")
    load_audio("voice.wav")
    assert ("voice.wav: all but silent" in capfd.readouterr().err) == silent


def test_an_empty_track_that_is_played_by_default_is_reported(folder, capfd):
    sound(np.zeros(3000), name="empty.wav")
    ffmpeg("-i", "empty.wav", "-i", "voice.wav", "-map", "0", "-map", "1", "two.mkv")
    load_audio("two.mkv")
    assert "two.mkv: all but silent; if it has another track" in capfd.readouterr().err


@pytest.fixture
def two_tracks(folder):
    """A video with a tone of 440 Hz and, the default, one of 1500 Hz."""
    sound(tone(16000, 440), name="first.wav")
    sound(tone(16000, 1500), name="second.wav")
    tracks = "-map 0:a -map 1:a -disposition:a:0 0 -disposition:a:1 default".split()
    ffmpeg("-i", "first.wav", "-i", "second.wav", *tracks, "two.mkv")


def loudest_frequency(path):
    return np.abs(np.fft.rfft(load_audio(path), 16000)).argmax()


def test_the_default_track_is_taken(run, two_tracks):
    assert run("sample --audio_path=two.mkv") == (0, [])
    assert abs(loudest_frequency("video.mp4") - 1500) < 5


def test_gaps_are_filled_in_the_video_too(run):
    """A sound that begins a second late begins a second late in what is written."""
    sound(tone(16000, 440))
    pictures = "-f lavfi -i color=s=64x64:d=2 -itsoffset 1".split()
    ffmpeg(*pictures, "-i", "voice.wav", "late.mkv")
    assert run("sample --audio_path=late.mkv") == (0, [])
    heard = load_audio("video.mp4")
    assert len(heard) > 31000
    assert np.abs(heard[:14000]).max() < 0.05 < np.abs(heard[18000:30000]).max()


# -------------------------------------------------------------------------------- the microphone
def test_on_windows_a_live_voice_is_refused_and_no_pipe_inherited(run, refused, monkeypatch):
    """Simulated: CPython asserts there that pass_fds is empty."""
    class Popen(subprocess.Popen):
        def __init__(self, *args, pass_fds=(), **options):
            assert not pass_fds, "pass_fds not supported on Windows."
            super().__init__(*args, **options)
    data.get_ffmpeg_exe()                          # remembered: it looks at the platform too
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(data, "Popen", Popen)
    assert run("sample --stream")[0] == 0
    refused("sample --audio_path=-", "which voice? a file", "nor on Windows", code=2)


@pytest.mark.parametrize("samples, flags, words", [
    (0, [], "-: no sound"),
    (32_000, ["--overlap=500"], "overlap=500")])
def test_a_mistake_is_reported_while_the_microphone_is_open(good, tmp_path, samples, flags, words):
    usual = ["--ckpt=ckpt.pt", "--audio_path=-", f"--output_path={tmp_path}/video.mp4"]
    process = start(good, "sample.py", *usual, *flags)
    process.stdin.write("x" * 2 * samples)
    if samples:
        process.stdin.flush()
    else:
        process.stdin.close()
    lines = reported("".join(process.stderr))
    assert process.wait() == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- odd, valid
def one_sample():
    sound([0.5])


def silence():
    sound(np.zeros(3000))


def a_constant():
    sound(np.full(3000, 0.9))


def clipped():
    sound(30 * NOISE)


def thirty_times_full_scale():
    sound(30 * NOISE, subtype="FLOAT")


def bits_24():
    sound(NOISE, subtype="PCM_24")


def bits_64():
    sound(NOISE, subtype="DOUBLE")


def bits_8_at_8_kHz():
    sound(NOISE, 8000, subtype="PCM_U8")


def at_96_kHz():
    sound(NOISE, 96000)


def eighty_samples_a_second():
    sound(np.full(100, 0.1), 80)


def six_channels():
    sound(NOISE.reshape(-1, 6))


def an_mp3_cut_in_the_middle():
    encode("v.mp3", 1500)
    shutil.move("v.mp3", "voice.wav")


def a_flac_called_wav():
    sound(NOISE, name="v.flac")
    shutil.move("v.flac", "voice.wav")


def test_a_name_may_hold_what_marks_a_span(run, soon_drawn):
    sound(NOISE, name="a#t=1.wav")
    assert run("sample --audio_path=a#t=1.wav --save_motion=m.npy") == (0, [])
    assert len(np.load("m.npy")) == 5
    assert run("sample --audio_path=a#t=1.wav#t=0,0.08 --save_motion=m.npy") == (0, [])
    assert len(np.load("m.npy")) == 2


@pytest.mark.parametrize("odd", [
    one_sample, silence, a_constant, clipped, thirty_times_full_scale, bits_24, bits_64,
    bits_8_at_8_kHz, at_96_kHz, eighty_samples_a_second, six_channels,
    an_mp3_cut_in_the_middle, a_flac_called_wav])
def test_what_is_merely_odd_becomes_a_video(run, soon_drawn, odd):
    odd()
    code, lines = run("sample --save_motion=m.npy")
    warned = ["voice.wav: all but silent; if it has another track, take that one out"]
    assert code == 0 and lines == (warned if odd is silence else [])
    motion = np.load("m.npy", allow_pickle=False)
    assert motion.shape[1] == 70 and np.isfinite(motion).all()
    assert imageio.get_reader("video.mp4").count_frames() == len(motion)
