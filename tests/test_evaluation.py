"""What each metric of the table sees, on motion that is made so that its value is known."""
import dataclasses

import numpy as np
import pytest
import torch

import build
import sample
import train
from data import (CONTROLS, MANNERS, RATE, Clips, ToyTalker, check_effects, expression,
                  parse_flags)
from moda import EMOTIONS, EXP, LIPS, MOUTH, ROT, SCALE, M
from tools import ablate
from tools.voices import speech_level

pytestmark = pytest.mark.usefixtures("one_thread")
STD = torch.linspace(0.5, 2, M)


def clips(K=6, T=200):
    """Smooth normalised motion, (K, T, 70)."""
    noise = torch.randn(K, T + 20, M)
    return noise.unfold(1, 21, 1).mean(-1) * 21 ** 0.5


def changed(channels, change, **size):
    """Metrics of motion of which some channels are changed."""
    truth = clips(**size)
    z = truth.clone()
    z[..., channels] = change(z[..., channels])
    return sample.compare(z, truth, STD)


def test_the_truth_agrees_with_itself():
    row = changed(MOUTH, lambda mouth: mouth)
    nothing = {"mouth error", "heads apart", "Frechet"}
    for metric, x in row.items():
        assert x == pytest.approx(float(metric not in nothing), abs=1e-5), metric


def test_a_mouth_that_opens_too_far_has_a_slope_and_an_error():
    truth = clips()
    truth[..., MOUTH] -= truth[..., MOUTH].mean(1, keepdim=True)
    z = truth.clone()
    z[..., MOUTH] *= 1.5
    row = sample.compare(z, truth, STD)
    assert row["mouth corr"] == pytest.approx(1)
    assert row["opening, least"] == pytest.approx(1.5)
    assert row["mouth error"] == pytest.approx(0.25, rel=0.01)         # (1.5 - 1)^2


def test_the_worst_mouth_among_many_is_seen():
    def change(mouth):
        mouth[0] *= 0.3
        mouth[1] *= 1.7
        return mouth
    row = changed(MOUTH, change)
    assert row["opening, least"] == pytest.approx(0.3)
    assert row["opening, most"] == pytest.approx(1.7)


def test_a_mouth_that_is_open_all_the_time_is_an_error_that_correlation_cannot_see():
    row = changed(MOUTH, lambda mouth: mouth + 2)
    assert row["mouth corr"] == pytest.approx(1)
    assert row["opening, most"] == pytest.approx(1)
    assert row["mouth error"] > 3


def test_shaking_raises_the_jerk_of_what_shakes_alone():
    row = changed(ROT, lambda rotation: rotation + 0.4 * torch.randn_like(rotation))
    assert row["jerk, rotation"] > 1.8
    assert row["head motion"] == pytest.approx(1, abs=0.15)
    for name in "lips", "translation", "scale":
        assert row[f"jerk, {name}"] == pytest.approx(1)


def test_jerk_and_head_motion_are_ratios():
    assert changed(ROT, lambda rotation: rotation / 2)["head motion"] == pytest.approx(0.5)
    assert changed(SCALE, lambda scale: 3 * scale)["jerk, scale"] == pytest.approx(3)
    assert changed(LIPS, lambda lips: 3 * lips)["jerk, lips"] == pytest.approx(3)


def test_heads_apart_is_the_distance_of_independent_heads():
    row = changed(ROT, torch.randn_like, K=40)
    assert row["heads apart"] == pytest.approx(2 ** 0.5, rel=0.05)     # two of variance 1


def test_the_frechet_distance_of_a_shifted_copy_is_the_shift_squared():
    row = changed(slice(0, 5), lambda z: z + 2)
    assert row["Frechet"] == pytest.approx(5 * 2 ** 2, rel=1e-4)


def test_the_frechet_distance_of_wider_motion_is_that_of_the_deviations():
    x = torch.randn(5000, 8).double() @ torch.randn(8, 8).double()
    x[:, 3] = 0                                                        # as some channels never move
    wider = sample.frechet(3 * x - 2 * x.mean(0), x)
    assert wider == pytest.approx(4 * x.T.cov().trace().item(), rel=1e-4)


def test_the_frechet_distance_sees_frames_in_another_order():
    truth = clips()
    order = torch.randperm(truth.size(1))
    assert sample.compare(truth[:, order], truth, STD)["Frechet"] > 1


# ------------------------------------------------------------------------------ emotions and voices
def test_a_held_expression_is_recognised_whatever_the_lips_do():
    held = {name: MANNERS[name] for name in CONTROLS}
    faces = torch.zeros(8, 50, M)
    faces[..., :63] = torch.tensor(expression(**held)).float()[:, None]
    faces[..., LIPS] = 0.1 * torch.randn(8, 50, len(LIPS))
    labels = torch.arange(8)
    assert sample.emotion_accuracy(faces, labels) == 1
    faces[1] = faces[EMOTIONS.index("neutral")]
    assert sample.emotion_accuracy(faces, labels) == 7 / 8


def test_sync_distance_is_zero_for_a_voice_a_few_frames_late_but_not_for_a_foreign_one():
    def expert(audio, motion):                                         # both are what it looks for
        return audio.flatten(2), motion
    lips = torch.nn.functional.normalize(torch.randn(3, 150, 6), dim=-1)
    late = sample.sync_scores(expert, lips.roll(7, 1)[:, :, None], lips)
    foreign = sample.sync_scores(expert, lips.roll(1, 0)[:, :, None], lips)
    assert late["Sync-D"] < 1e-3
    assert late["Sync-C"] > 1
    assert foreign["Sync-D"] > 1
    assert foreign["Sync-C"] < 0.2


# ------------------------------------------------------------------------- data and linear baseline
class Recorded(Clips):
    read = ToyTalker.read                          # from memory

    def __init__(self, clips):
        self.clips = clips
        rows = [dict(frames=len(motion), emotion=k) for k, (motion, *_) in enumerate(clips)]
        self.index(rows, clips[0][1].shape[1:], [[0.0] * M] * 2, [[0.0] * 63] * 2)


def recorded(lengths, lag, layers=2):
    """A data set whose motion is a linear function of features `lag` frames ago."""
    mixing = torch.randn(5, M, generator=torch.Generator().manual_seed(0))
    clips = []
    for n in lengths:
        audio = torch.randn(n, layers, 5)
        motion = 0.5 + (audio.mean(1) @ mixing).roll(lag, 0)
        clips.append((motion.numpy(), audio.numpy().astype(np.float16), np.zeros(63)))
    return Recorded(clips)


@pytest.mark.parametrize("lag, found", [(-3, True), (0, True), (3, True), (4, False)])
def test_the_linear_baseline_looks_three_frames_back_and_ahead(tiny, lag, found):
    data = recorded([185] * 4, lag)
    truth, audio, *_ = sample.beginnings(data, 2, tiny)
    z = sample.linear_baseline(tiny, recorded([200] * 30, lag), audio)
    explained = 1 - (z - truth)[:, 5:-5].var() / truth.var()
    assert (explained > 0.95) == found


def test_the_longest_clips_are_taken_and_cut_to_one_length(tiny):
    data = recorded([90, 150, 120, 185, 300], lag=0)
    motion, audio, identity, before, emotion = sample.beginnings(data, 3, tiny)
    assert emotion.tolist() == [4, 3, 1]
    assert motion.shape == (3, 149, M)
    assert audio.shape == (3, 149, 2, 5)
    true = torch.tensor(data.clips[1][0])
    assert torch.equal(before[2], tiny.normalise(true[0]))             # the frame before the others
    assert torch.equal(motion[2], tiny.normalise(true[1:]))
    motion, *_ = sample.beginnings(data, 2, tiny)
    assert motion.shape == (2, 184, M)


# ------------------------------------------------------------------------------- the table as whole
@pytest.fixture
def spoken(monkeypatch):
    """What the model is given, clip by clip, as dicts; it answers with noise."""
    calls = []

    def generate(model, audio, identity, prev, emotion, **options):
        calls.append(dict(audio=audio, prev=prev, emotion=int(emotion), seed=options["seed"]))
        return torch.randn(len(audio), M)
    monkeypatch.setattr(sample, "generate", generate)
    return calls


def test_the_other_voice_meets_a_face_at_rest_and_emotions_in_turn(tiny, spoken):
    data = recorded([185] * 9, lag=0)
    table = sample.evaluate(sample.Settings(alse=""), tiny, data, data)
    assert [*table] == ["truth", "model", "other voice", "linear", "other seed"]
    own, other, again = spoken[:9], spoken[9:18], spoken[18:]
    assert [call["emotion"] for call in own] == [*range(9)]
    assert [call["emotion"] for call in other] == [*range(8), 0]
    assert {call["seed"] for call in again} == {2}
    for call in other:
        rest = tiny.denormalise(call["prev"])
        assert rest[EXP].abs().max() < 1e-6
        assert torch.allclose(rest[63:], tiny.mean[63:])
        assert all(not torch.equal(call["audio"], mine["audio"]) for mine in own)
    for call, mine in zip(again, own):
        assert torch.equal(call["audio"], mine["audio"])


def test_of_many_clips_as_many_are_judged_as_after_a_training(tiny, spoken):
    data = recorded([185] * 20, lag=0)
    sample.evaluate(sample.Settings(alse=""), tiny, data, data)
    count = train.Settings().eval_clips
    assert len(spoken) == 3 * count
    assert [call["emotion"] for call in spoken[:count]] == [*range(count)]     # the first ones


def test_a_single_clip_is_not_given_its_own_voice_as_the_other_one(tiny, spoken):
    data = recorded([185], lag=0)
    sample.evaluate(sample.Settings(alse=""), tiny, data, data)
    own, other, again = [call["audio"] for call in spoken]
    assert not torch.equal(own, other)
    assert torch.equal(own, again)


def test_the_val_clips_of_a_data_set_are_judged_but_not_their_emotions(tmp_path, capsys):
    folder = build.data_set(tmp_path / "set", (150, 120), (2, 5), splits=("train", "val"))
    model = build.model(audio_layers=2, audio_dim=5)
    model.std.fill_(2)
    state = dict(kind="MoDA", config=dataclasses.asdict(model.cfg), model=model.state_dict())
    torch.save(state, tmp_path / "ckpt.pt")
    table = sample.main([f"--ckpt={tmp_path}/ckpt.pt", "--eval", f"--data_dir={folder}",
                         "--steps=1", "--alse="])
    assert table["truth"]["mouth corr"] == pytest.approx(1)
    assert table["model"]["mouth corr"] < 0.5
    assert "emotion" not in table["truth"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == "truth model other voice linear other seed".split()
    assert len(printed) == 1 + len(table["truth"])


def test_the_level_of_speech_is_heard_in_the_band_of_a_telephone_only():
    time = np.arange(RATE) / RATE
    for hz, level in (100, 0), (1000, 0.5 ** 0.5), (5000, 0):
        assert np.allclose(speech_level(np.sin(2 * np.pi * hz * time)), level, atol=1e-3)


def test_the_flags_of_all_ablations_are_known(tmp_path, monkeypatch):
    def trained(argv):
        train.read_settings(argv)
        names.append(argv[0])
    names = []
    monkeypatch.setattr(train, "main", trained)
    settings = ablate.Settings(out=str(tmp_path))
    ablate.trained(settings, "expert", "--model=alse")
    for variants in ablate.CLAIMS.values():
        for variant in variants.values():
            ablate.trained(settings, "x", *variant.training.format(out=tmp_path).split())
            flags = ["--eval", *variant.sampling.split()]
            sampling = sample.Settings()
            check_effects(parse_flags(flags, "", sampling), sampling, sample.EFFECTS)
    assert len(names) == 20
