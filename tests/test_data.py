"""Sound comes in whole whatever its format; the toy talker is data with a known truth; a window is
what lies on disk, and a damaged one is named."""
import math
import shutil
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

import build
import data
from data import (CONTROLS, MANNERS, RATE, Clips, ToyTalker, expression, load_audio, log_mel,
                  log_mel_blocks, toy_clip)
from moda import EMOTIONS, MOUTH, M


# ------------------------------------------------------------------------------------------- sound
@pytest.mark.parametrize("rate, channels, suffix", [
    (16000, 1, "wav"), (44100, 2, "wav"), (8000, 1, "flac"), (48000, 6, "wav"), (96000, 1, "wav"),
    (44100, 2, "ogg"), (22050, 1, "mp3")])
def test_load_audio_reads_any_rate_and_channel_count(tmp_path, rate, channels, suffix):
    seconds = np.arange(2 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    path = tmp_path / f"a tone's \"name\".{suffix}"
    soundfile.write(path, np.repeat(tone[:, None], channels, 1), rate)
    wav = load_audio(path)
    slack = 3000 if suffix == "mp3" else 0
    assert wav.dtype == np.float32
    assert abs(len(wav) - 2 * RATE) <= slack
    spectrum = np.abs(np.fft.rfft(wav[RATE // 2:RATE // 2 + RATE]))
    assert spectrum.argmax() == 440


def test_log_mel_is_the_same_however_the_sound_is_cut():
    wav = toy_clip(3, 60)[0][:-300]
    whole = log_mel(wav)
    assert whole.shape == (60, 1, 160)
    assert log_mel(0 * wav).abs().max() == 0
    for cuts in [1], [639, 5000], list(range(100, len(wav), 777)):
        pieces = np.split(wav, cuts)
        assert torch.equal(whole, torch.cat(list(log_mel_blocks(pieces))))


# ---------------------------------------------------------------------------------- the toy talker
@pytest.mark.parametrize("gain", [-24, -12, 12, 24])
def test_features_do_not_depend_on_the_gain_of_a_recording(gain):
    wav, *_ = toy_clip(5, 75)                                  # it speaks from the start
    louder = log_mel(wav * 10 ** (gain / 20))
    assert torch.allclose(louder, log_mel(wav), atol=1e-3)


def test_rumble_makes_a_voice_no_softer():
    """A hum of 50 Hz, ten times as strong, leaves the bands above 380 Hz as they are."""
    wav, *_ = toy_clip(5, 75)
    hum = 14 * wav.std() * np.sin(2 * np.pi * 50 / RATE * np.arange(len(wav)))
    alone, beside = [log_mel(x).view(-1, 40)[:, 6:] for x in (wav, wav + hum)]
    assert alone.max() > 0.5
    assert (alone - beside).abs().max() < 0.05


def test_a_voice_after_a_long_silence_soon_sounds_as_it_does_alone():
    wav, *_ = toy_clip(6, 300)
    alone, later = log_mel(wav), log_mel(np.pad(wav, (10 * RATE, 0)))[250:]
    assert (later - alone).max() < math.log(5) / 3             # at first by up to 7 dB too loud
    assert torch.allclose(later[125:], alone[125:], atol=1e-3)           # after five seconds not


def test_what_is_all_but_silent_stays_silent():
    """Hiss of -90 dBFS is not made as loud as a voice, alone or after one."""
    hiss = np.random.default_rng(0).normal(0, 3e-5, 2 * RATE)
    assert log_mel(hiss).max() < 0.1
    voice, *_ = toy_clip(3, 50)
    assert log_mel(np.concatenate([voice, hiss]))[51:].max() < 0.1


def test_the_jaw_control_is_livePortraits_mouth_opening():
    assert np.isclose(expression(aaa=60)[MOUTH], 0.06)
    smile = expression(smile=1.0).reshape(21, 3)
    assert np.allclose([smile[20, 1], smile[14, 1], smile[17, 1]], [-0.01, -0.02, 0.0065])
    assert expression(blink=-np.arange(4.0)).shape == (4, 63)


def speech_band(wav):
    """Loudness per frame from 300 to 3400 Hz, where there is less music: (T,)."""
    spectrum = np.fft.rfft(wav)
    hz = np.fft.rfftfreq(len(wav), 1 / RATE)
    spectrum[(hz < 300) | (hz > 3400)] = 0
    return np.sqrt((np.fft.irfft(spectrum).reshape(-1, 640) ** 2).mean(1))


def test_toy_clips_are_repeatable_and_their_lips_follow_the_voice():
    first = wav, motion, emotion, identity = toy_clip(5, 200)
    assert all(np.array_equal(a, b) for a, b in zip(first, toy_clip(5, 200)))
    assert wav.shape == (200 * 640,)
    assert motion.shape == (200, M)
    assert identity.shape == (63,)
    fits = []
    for seed in range(12):
        wav, motion, *_ = toy_clip(seed, 200)
        fits.append(np.corrcoef(speech_band(wav), motion[:, MOUTH])[0, 1])
    assert np.mean(fits) > 0.9


def test_toy_motion_is_as_large_as_published_motion():
    motion = np.concatenate([toy_clip(seed, 100)[1] for seed in range(16)])
    mouth, scale, yaw = motion[:, [MOUTH, 63, 68]].T
    assert -0.05 < mouth.min() < 0
    assert 0.04 < mouth.max() < 0.12
    assert 0.008 < mouth.std() < 0.03                          # recordings: 0.010 to 0.029
    assert 1.1 < scale.min()
    assert scale.max() < 1.5
    assert np.abs(yaw).max() < 30


def test_every_emotion_has_its_own_face():
    held = {name: MANNERS[name] for name in CONTROLS}
    faces = expression(**held)
    apart = np.linalg.norm(faces[:, None] - faces, axis=-1) + np.eye(8)
    assert len(faces) == len(EMOTIONS) - 1                     # all but none
    assert apart.min() > 0.003


# --------------------------------------------------------------------------- windows and data sets
def test_windows_start_everywhere_and_carry_the_frame_before():
    toy = ToyTalker("val", 3)
    assert len(toy) == 3 * (200 - 80)
    window = toy[125]                                          # clip 1, the sixth window
    motion, audio, identity = toy.clips[1]
    assert np.array_equal(window["prev"], motion[5])
    assert np.array_equal(window["motion"], motion[6:86])
    assert np.array_equal(window["audio"], audio[6:86])
    assert np.array_equal(window["identity"], identity)
    assert window["emotion"] == toy.emotion[1]
    last = toy[len(toy) - 1]
    assert np.array_equal(last["motion"], toy.clips[2][0][120:])


def test_opening_a_data_set_opens_its_manifest_only(tmp_path):
    folder = build.data_set(tmp_path / "set", lengths=(200, 90), audio_shape=(3, 6))
    shutil.rmtree(folder / "clips")
    clips = Clips(folder)
    assert len(clips) == 120 + 10
    assert clips.audio_shape == (3, 6)
    assert clips.moments.tolist() == [[0] * M, [2] * M]
    with pytest.raises(ValueError, match="clips/1: cannot be used .*No such file"):
        clips[129]


def test_a_window_of_a_long_clip_takes_no_more_memory_than_itself(tmp_path):
    clips = Clips(build.data_set(tmp_path / "set", lengths=(3000,), audio_shape=(12, 768)))
    tracemalloc.start()
    clips[1500]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6                                          # bytes, of 55 million


def rewrite(name, change):
    """Damage to an array of a clip."""
    def harm(clip):
        np.save(clip / f"{name}.npy", change(np.load(clip / f"{name}.npy")))
    return harm


def cut(name, n):
    def harm(clip):
        file = clip / f"{name}.npy"
        file.write_bytes(file.read_bytes()[:n])
    return harm


class Code:
    """A pickle that would make a folder."""

    def __reduce__(self):
        return data.Path.mkdir, (data.Path("run_by_a_pickle"),)


DAMAGE = {
    "missing folder": shutil.rmtree,
    "missing file": lambda clip: (clip / "motion.npy").unlink(),
    "empty": cut("audio", 0),
    "truncated in the header": cut("audio", 50),
    "truncated": cut("audio", 5000),
    "a pickle": rewrite("identity", lambda x: np.array(Code())),
    "short": rewrite("motion", lambda x: x[:50]),
    "69 numbers": rewrite("motion", lambda x: x[:, 1:]),
    "another encoder": rewrite("audio", lambda x: x.repeat(12, 1)),
    "20 keypoints": rewrite("identity", lambda x: x[3:]),
    "NaN in the motion": rewrite("motion", lambda x: x * np.nan),
    "NaN in the audio": rewrite("audio", lambda x: x * np.nan),
    "infinite identity": rewrite("identity", lambda x: x + np.inf)}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_clip_is_named_in_one_line_and_others_are_not_harmed(tmp_path, harm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = Clips(build.data_set(tmp_path / "set"))
    harm(tmp_path / "set/clips/1")
    clips[0], clips[119]                                       # of clip 0
    with pytest.raises(ValueError, match="set/clips/1: .*prepare the data again") as error:
        clips[120]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run_by_a_pickle").exists()


def test_damage_elsewhere_in_a_clip_harms_no_window(tmp_path):
    clips = Clips(build.data_set(tmp_path / "set", lengths=(200,)))

    def last_is_nan(motion):
        motion[-1] = np.nan
        return motion
    rewrite("motion", last_is_nan)(tmp_path / "set/clips/0")
    assert clips[118]["motion"].isfinite().all()
    with pytest.raises(ValueError, match="cannot be used .motion is of another size, or not finite"):
        clips[119]


@pytest.mark.parametrize("content", [
    dict(), dict(settings={}), dict(clips=[]), dict(clips=[], audio_shape=[1, 160], moments=[]),
    dict(clips=[dict(file="clips/1.safetensors", split="train")])], ids=str)
def test_a_manifest_without_clips_is_one_line(tmp_path, content):
    build.write_manifest(tmp_path, **content)
    with pytest.raises(ValueError, match="manifest.json: no train clips there") as error:
        Clips(tmp_path)
    assert "\n" not in str(error.value)


def test_no_data_set_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*; prepare a data set: .*No such file"):
        Clips(tmp_path / "nowhere")
