"""Sound comes in whole whatever its format, and the toy talker is data with a known truth."""
import numpy as np
import pytest
import soundfile
import torch

from data import LOOKS, RATE, ToyTalker, expression, load_audio, log_mel, log_mel_blocks, toy_clip
from moda import EMOTIONS, MOUTH


@pytest.mark.parametrize("rate, channels, suffix", [(16000, 1, "wav"), (44100, 2, "wav"), (8000, 1, "flac"), (48000, 6, "wav"),
                                                    (96000, 1, "wav"), (44100, 2, "ogg"), (22050, 1, "mp3")])
def test_load_audio_reads_any_rate_and_channel_count(tmp_path, rate, channels, suffix):
    t = np.arange(2 * rate) / rate
    path = tmp_path / f"a tone's \"name\".{suffix}"
    soundfile.write(path, np.repeat(0.5 * np.sin(2 * np.pi * 440 * t)[:, None], channels, 1), rate)
    wav = load_audio(path)
    assert wav.dtype == np.float32 and abs(len(wav) - 2 * RATE) <= (3000 if suffix == "mp3" else 0)
    spectrum = np.abs(np.fft.rfft(wav[RATE // 2:RATE // 2 + RATE]))
    assert spectrum.argmax() == 440


def test_log_mel_is_the_same_however_the_sound_is_cut():
    wav = toy_clip(3, 60)[0][:-300]
    whole = log_mel(wav, 60)
    assert whole.shape == (60, 1, 160) and log_mel(0 * wav, 60).abs().max() == 0
    for cuts in ([1], [639, 5000], list(range(100, len(wav), 777))):
        assert torch.equal(whole, torch.cat(list(log_mel_blocks(np.split(wav, cuts)))))


def test_the_jaw_control_is_livePortraits_mouth_opening():
    assert np.isclose(expression(aaa=60)[MOUTH], 0.06)
    smile = expression(smile=1.0).reshape(21, 3)
    assert np.allclose([smile[20, 1], smile[14, 1], smile[17, 1]], [-0.01, -0.02, 0.0065])
    assert expression(blink=-np.arange(4.0)).shape == (4, 63)


def test_toy_clips_are_repeatable_and_their_lips_follow_the_voice():
    wav, motion, emotion, identity = toy_clip(5, 200)
    assert all(np.array_equal(a, b) for a, b in zip((wav, motion, emotion, identity), toy_clip(5, 200)))
    assert wav.shape == (200 * 640,) and motion.shape == (200, 70) and np.abs(wav).max() <= 1
    corr = []
    for seed in range(12):
        wav, motion, *_ = toy_clip(seed, 200)
        spectrum = np.fft.rfft(wav)
        spectrum[:300 * 8], spectrum[3400 * 8:] = 0, 0                       # the band of speech: there may be music
        loud = np.sqrt((np.fft.irfft(spectrum).reshape(200, 640) ** 2).mean(1))
        corr.append(np.corrcoef(loud, motion[:, MOUTH])[0, 1])
    assert np.mean(corr) > 0.6


def test_toy_motion_has_real_magnitudes_and_every_emotion_its_own_face():
    motion = np.concatenate([toy_clip(seed, 100)[1] for seed in range(16)])
    assert -0.05 < motion[:, MOUTH].min() < 0 and 0.04 < motion[:, MOUTH].max() < 0.12
    assert 0.008 < motion[:, MOUTH].std() < 0.03                              # as published recordings: 0.010 to 0.029
    assert 1.1 < motion[:, 63].min() and motion[:, 63].max() < 1.5 and np.abs(motion[:, 68]).max() < 30
    faces = expression(smile=LOOKS[:, 0], brow=LOOKS[:, 1], frown=LOOKS[:, 2], blink=LOOKS[:, 3])
    apart = np.linalg.norm(faces[:, None] - faces, axis=-1) + np.eye(8)
    assert len(faces) == len(EMOTIONS) - 1 and apart.min() > 0.003


def test_windows_start_everywhere_and_carry_the_frame_before():
    toy = ToyTalker("val", 3)
    assert len(toy) == 3 * (200 - 80)
    window = toy[125]                                                        # clip 1, the sixth window
    motion, audio, identity = toy.clips[1].values()
    assert np.array_equal(window["motion"], motion[6:86]) and np.array_equal(window["prev"], motion[5])
    assert np.array_equal(window["audio"], audio[6:86]) and window["emotion"] == toy.emotion[1] and window["mask"].all()
    last = toy[len(toy) - 1]
    assert np.array_equal(last["motion"], toy.clips[2]["motion"][120:])
