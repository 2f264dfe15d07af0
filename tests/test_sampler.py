"""The sampler solves the flow, guides as Eq. 8 says, and streams what it would have sampled at once."""
import math

import pytest
import torch

from moda import M, euler, guidance_passes, sample, stream


def test_euler_is_exact_on_a_straight_path():
    z0, eps = torch.randn(2, 8, M)
    assert torch.allclose(euler(lambda z, k: eps - z0, eps, [1.0]), z0, atol=1e-5)
    assert torch.allclose(euler(lambda z, k: eps - z0, eps, [1 - k / 7 for k in range(7)]), z0, atol=1e-5)


def test_guidance_is_equation_8():
    assert guidance_passes({"audio": 0.2, "emotion": 0.5}, 3) == [(1.7, False, 3), (-0.2, True, 3), (-0.5, False, 8)]
    assert guidance_passes({"audio+emotion": 0.2}, 3) == [(1.2, False, 3), (-0.2, True, 8)]
    assert guidance_passes({"audio": 0, "emotion": 0.5}, 8) == [(1, False, 8)]         # passes that change nothing
    with pytest.raises(ValueError, match="identity"):
        guidance_passes({"identity": 1.0}, 3)


def voice(T):
    return dict(audio=torch.randn(T, 1, 160), identity=torch.randn(63), prev=torch.randn(M))


def test_a_sample_is_the_euler_loop_written_out(tiny):
    x, z = voice(30), torch.randn(30, M)
    row = lambda y: y[None]
    expected = z.clone()[None]
    for k in range(4):
        args = torch.tensor([1 - k / 4]), row(x["audio"]), torch.tensor([4]), row(x["identity"]), row(x["prev"])
        full, deaf = tiny(expected, *args), tiny(expected, *args, drop_audio=torch.tensor([True]))
        expected = expected - (full + 0.3 * (full - deaf)) / 4
    made = sample(tiny, **x, emotion=4, steps=4, guidance={"audio": 0.3}, chunk=30, noise=z[None])
    assert torch.allclose(made, expected[0], atol=1e-5)
    zero = sample(tiny, **x, steps=4, guidance={"audio": 0.0}, chunk=30, noise=z[None])
    assert torch.equal(zero, sample(tiny, **x, steps=4, guidance={}, chunk=30, noise=z[None]))


@pytest.mark.parametrize("smooth", [False, True])
def test_however_the_audio_is_cut_the_motion_is_the_same(tiny, smooth):
    x = voice(333)
    options = dict(identity=x["identity"], prev=x["prev"], steps=2, smooth=smooth, seed=3)
    whole = sample(tiny, x["audio"], **options)
    for n in (1, 7, 100):
        assert torch.equal(whole, torch.cat(list(stream(tiny, iter(x["audio"].split(n)), **options))))
    assert not torch.equal(whole, sample(tiny, x["audio"], **dict(options, seed=4)))


def test_every_length_comes_back_whole(tiny):
    for T in (1, 2, 15, 16, 17, 83, 84, 85, 99, 100, 101, 116, 117, 184, 185):
        made = sample(tiny, **voice(T), steps=1)
        assert made.shape == (T, M) and made.isfinite().all()


def test_a_chunk_leaves_as_soon_as_it_is_final(tiny):
    """100 frames of voice give the 84 frames that no later voice can change; the rest waits for the cross-fade."""
    x, asked = voice(300), []

    def microphone():
        for frame in x["audio"].split(1):
            asked.append(1)
            yield frame
    parts = stream(tiny, microphone(), x["identity"], x["prev"], steps=1)
    assert len(next(parts)) == 84 and len(asked) == 100
    assert len(next(parts)) == 84 and len(asked) == 184


def test_the_next_chunk_sees_the_frame_before_it(tiny):
    """prev of chunk 2 is frame 83, so a changed prev of chunk 1 is felt in chunk 2 only through it."""
    seen = []
    conditions = tiny.conditions
    tiny.conditions = lambda audio, emotion, identity, prev, drop: seen.append(prev[0]) or conditions(
        audio, emotion, identity, prev, drop)
    try:
        x = voice(150)
        made = sample(tiny, **x, steps=1)
    finally:
        del tiny.conditions
    assert torch.equal(seen[0], x["prev"]) and torch.equal(seen[1], made[83])


def test_bad_requests_are_refused(tiny):
    for bad in (dict(overlap=100), dict(chunk=0), dict(steps=0)):
        with pytest.raises(ValueError):
            sample(tiny, **voice(20), **bad)
    with pytest.raises(ValueError, match=r"hears \(1, 160\) .* not \(12, 160\)"):
        sample(tiny, **dict(voice(20), audio=torch.randn(20, 12, 160)))
    with pytest.raises(ValueError, match="no frames"):
        sample(tiny, **voice(0))


def test_a_new_emotion_begins_a_chunk_and_a_first_chunk_may_be_short(tiny):
    x = voice(100)
    options = dict(steps=2, chunk=40, overlap=8)
    plain = sample(tiny, **x, emotion=5, **options)
    parts = list(stream(tiny, **x, emotion=[(5, 50), (4, math.inf)], **options))
    assert [len(part) for part in parts] == [32, 18, 32, 18]
    changed = torch.cat(parts)
    assert torch.equal(changed[:50], plain[:50]) and not torch.allclose(changed[58:], plain[58:], atol=1e-2)
    assert [len(part) for part in stream(tiny, **x, first_chunk=20, **options)] == [12, 32, 32, 24]
