"""The sampler solves the flow, guides as Eq. 8 says, and streams what it would have sampled at
once; the faster network computes what the plain model computes, but in short chunks."""
import math
from functools import partial

import numpy as np
import pytest
import torch

import build
import moda
import sample
from conftest import plain_network
from data import BLOCK, UsageError
from moda import (NO_EMOTION, STRAIGHT, M, euler, euler_times, generate, guidance_of,
                  guided_velocity, losses, reflow, stream)


def voice(T):
    return dict(audio=torch.randn(T, 1, 160), identity=torch.randn(63), prev=torch.randn(M))


def velocity(model, z, t, emotion, drop_audio, audio, identity, prev):
    """One call of the model for one clip."""
    rows = [x[None] for x in (z, t, audio, torch.tensor(emotion), identity, prev)]
    return model(*rows, torch.tensor([drop_audio]))[0]


def test_euler_is_exact_on_a_straight_path():
    z0, eps = torch.randn(2, 8, M)
    for times in [1.0], [1 - k / 7 for k in range(7)]:
        assert torch.allclose(euler(lambda z, t: eps - z0, eps, times), z0, atol=1e-5)


@torch.inference_mode()
def test_guidance_is_equation_8(tiny):
    x, z, t = voice(30), torch.randn(30, M), torch.tensor(0.7)
    v = velocity(tiny, z, t, 3, False, **x)
    without_audio = velocity(tiny, z, t, 3, True, **x)
    without_emotion = velocity(tiny, z, t, NO_EMOTION, False, **x)
    without_both = velocity(tiny, z, t, NO_EMOTION, True, **x)

    def guided(**guidance):
        own = z, x["audio"], x["identity"], x["prev"]
        z_, audio, identity, prev = [torch.stack([torch.randn_like(y), y]) for y in own]
        emotion = torch.tensor([5, 3])             # of another clip, and of this one
        return guided_velocity(tiny, z_, t, audio, emotion, identity, prev, guidance)[1]
    each = (1 + 0.2 + 0.5) * v - 0.2 * without_audio - 0.5 * without_emotion
    both = (1 + 0.3) * v - 0.3 * without_both
    assert torch.allclose(guided(audio=0.2, emotion=0.5), each, atol=1e-5)
    assert torch.allclose(guided(**{"audio+emotion": 0.3}), both, atol=1e-5)
    assert torch.allclose(guided(), v, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_a_sample_is_the_euler_loop_written_out(tiny, monkeypatch, fast):
    if not fast:
        monkeypatch.setattr(moda, "fast_network", plain_network)
    x, noise = voice(30), torch.randn(30, M)
    z = noise
    with torch.inference_mode():
        for k in range(4):
            t = torch.tensor(1 - k / 4)
            v = velocity(tiny, z, t, 4, False, **x)
            without_audio = velocity(tiny, z, t, 4, True, **x)
            z = z - (1.3 * v - 0.3 * without_audio) / 4
    options = dict(emotion=4, steps=4, chunk=30, noise=noise[None])
    assert torch.allclose(generate(tiny, **x, guidance={"audio": 0.3}, **options), z, atol=1e-5)


def test_guidance_by_nothing_changes_nothing(tiny):
    """A factor of zero, and an emotion that is none with or without being dropped."""
    options = dict(voice(30), emotion=NO_EMOTION, steps=2, chunk=30)
    unguided = generate(tiny, guidance={}, **options)
    assert torch.equal(generate(tiny, guidance={"audio": 0.0}, **options), unguided)
    by_emotion = generate(tiny, guidance={"emotion": 0.5}, **options)
    assert torch.allclose(by_emotion, unguided, atol=1e-5)


NETWORKS = {
    "2 streams rotated": dict(rope_streams=2),
    "4 streams rotated": dict(rope_streams=4),
    "2 rotated, four-stream blocks only": dict(rope_streams=2, n_four=2, n_two=0, n_one=0)}
GUIDANCE = [{}, {"audio": 0.5}, {"emotion": 2.0}, {"audio": 0.5, "emotion": 2.0},
            {"audio+emotion": 0.7}, {"audio": 0.5, "emotion": 2.0, "audio+emotion": 0.7}]


@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_the_faster_network_equals_the_plain_model(config, guidance, monkeypatch):
    """With one emotion, and with several in turn, the first of which comes back."""
    model, x = build.model(**config), voice(30)
    for emotion in 4, [(5, 12), (2, 10), (5, math.inf)]:
        options = dict(x, emotion=emotion, guidance=guidance, steps=2, chunk=20, overlap=4)
        motion = generate(model, **options)
        with monkeypatch.context() as patch:
            patch.setattr(moda, "fast_network", plain_network)
            plain = generate(model, **options)
        assert (motion - plain).abs().max() < 1e-5 * plain.std()


def test_the_faster_network_computes_adaln_before_all_steps(tiny):
    network = moda.fast_network(tiny, torch.tensor([1.0, 0.5]), [8, 4], 20)
    tables = [module.adaln for module in network.modules() if hasattr(module, "adaln")]
    assert len(tables) == len([name for name, _ in tiny.named_parameters() if "adaln.bias" in name])
    assert all(isinstance(table, torch.nn.Embedding) and len(table.weight) == 4 for table in tables)


def test_in_short_chunks_attention_is_less_sharp(monkeypatch):
    """q k^T goes with the logarithm of the number of tokens; in long chunks nothing changes."""
    model, x = build.model(chunk=40), voice(60)
    options = dict(x, steps=2, overlap=4, guidance={"audio": 0.5})
    adapted, usual, long = [generate(model, **options, chunk=chunk) for chunk in (20, 40, 60)]
    monkeypatch.setattr(moda, "fast_network", plain_network)
    for motion, chunk in (usual, 40), (long, 60):
        assert torch.allclose(generate(model, **options, chunk=chunk), motion, atol=1e-5)
    assert not torch.allclose(generate(model, **options, chunk=20), adapted, atol=1e-3)
    for name, gain in model.named_parameters():
        if "q_norm" in name:
            gain.data *= math.log(4 * 20) / math.log(4 * 40)
    assert torch.allclose(generate(model, **options, chunk=20), adapted, atol=1e-5)


def test_sampling_leaves_the_model_as_it_was(tiny):
    x = voice(20)
    given = torch.randn(20, M), torch.tensor(0.5), 1, False
    before = velocity(tiny, *given, **x)
    generate(tiny, **x, steps=1)
    assert torch.equal(velocity(tiny, *given, **x), before)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_voice_that_comes_frame_by_frame_gives_the_same_motion(tiny, smooth):
    x = voice(333)
    audio = x.pop("audio")
    options = dict(x, steps=2, smooth=smooth, seed=3)
    whole = generate(tiny, audio, **options)
    assert torch.equal(whole, torch.cat([*stream(tiny, iter(audio), **options)]))
    assert not torch.equal(whole, generate(tiny, audio, **dict(options, seed=4)))


def test_every_length_comes_back_whole(tiny):
    for T in 1, 2, 15, 16, 17, 83, 84, 85, 99, 100, 101, 116, 117, 184, 185:
        motion = generate(tiny, **voice(T), steps=1)
        assert motion.shape == (T, M)
        assert motion.isfinite().all()


def test_a_chunk_leaves_as_soon_as_it_is_final(tiny):
    """100 frames of voice give the 84 that no later sound can change; the others have to fade."""
    x, asked = voice(300), []

    def microphone():
        for frame in x["audio"]:
            asked.append(frame)
            yield frame
    pieces = stream(tiny, microphone(), x["identity"], x["prev"], steps=1)
    assert (len(next(pieces)), len(asked)) == (84, 100)
    assert (len(next(pieces)), len(asked)) == (84, 184)


@pytest.mark.parametrize("latency", [0.4, 0.65, 1.0])
def test_no_frame_of_a_short_chunk_waits_longer_than_asked(tiny, latency):
    """With a frame's time left for the work, where sound comes in blocks."""
    heard, n = 0, 0

    def microphone():
        nonlocal heard
        for block in torch.randn(60, 1, 160).split(BLOCK):
            heard += len(block)
            yield from block
    x = voice(1)
    pieces = stream(tiny, microphone(), x["identity"], x["prev"], steps=1,
                    **sample.short_chunks(latency))
    for piece in pieces:
        if heard < 60:                             # the end needs no sound after it
            assert heard - (n + 1) <= 25 * latency - 1
        n += len(piece)
    assert n == 60
    assert sample.short_chunks(4.6)["chunk"] == 40 + 115
    for wrong in 0.39, 400.0:                      # the second one, perhaps, in milliseconds
        with pytest.raises(UsageError, match="should be 0.4 to 40 seconds"):
            sample.short_chunks(wrong)


def test_the_next_chunk_sees_the_frame_before_it(tiny, monkeypatch):
    seen = []

    def spy(model, z, t, audio, emotion, identity, prev, guidance):
        seen.append(prev)
        return guided_velocity(model, z, t, audio, emotion, identity, prev, guidance)
    monkeypatch.setattr(moda, "guided_velocity", spy)
    x = voice(150)
    motion = generate(tiny, **x, steps=1)
    first, second = seen
    assert torch.equal(first[0], x["prev"])
    assert torch.equal(second[0], motion[83])


def test_steps_may_be_an_integer_of_numpy(tiny):
    x = voice(20)
    assert torch.equal(generate(tiny, **x, steps=np.int64(3)), generate(tiny, **x, steps=3))


def test_the_last_emotion_lasts_to_the_end(tiny):
    x = voice(60)
    motion = generate(tiny, **x, emotion=[(5, 10), (4, 10)], chunk=20, overlap=4)
    assert motion.shape == (60, M)


def test_bad_requests_are_refused(tiny):
    for bad in dict(overlap=100), dict(past=17), dict(chunk=0), dict(steps=-1):
        with pytest.raises(ValueError, match="should be"):
            generate(tiny, **voice(20), **bad)
    with pytest.raises(RuntimeError, match="shape"):
        generate(tiny, **voice(20), noise=torch.randn(1, 99, M))
    with pytest.raises(ValueError, match="identity.*: should be of audio, emotion, audio.emotion"):
        generate(tiny, **voice(20), guidance={"identity": 1.0})
    with pytest.raises(ValueError, match=r"takes \(1, 160\) .* not \(12, 160\)"):
        generate(tiny, **dict(voice(20), audio=torch.randn(20, 12, 160)))
    with pytest.raises(ValueError, match="no frames"):
        generate(tiny, **voice(0))
    with pytest.raises(ValueError, match="no frames"):
        generate(tiny, **voice(0), past=3)
    with pytest.raises(ValueError, match="not .12, 160"):
        generate(tiny, **dict(voice(20), audio=torch.randn(20, 12, 160)), past=3)


def test_a_new_emotion_begins_a_chunk(tiny):
    x = voice(100)
    options = dict(x, steps=2, chunk=40, overlap=8)
    plain = generate(tiny, emotion=5, **options)
    pieces = list(stream(tiny, emotion=[(5, 50), (4, math.inf)], **options))
    assert [len(piece) for piece in pieces] == [32, 18, 32, 18]
    changed = torch.cat(pieces)
    assert torch.allclose(changed[:50], plain[:50], atol=1e-5)
    assert not torch.allclose(changed[58:], plain[58:], atol=1e-2)


def test_short_strides_go_on_from_frames_that_stay_and_at_first_from_silence(tiny):
    x, noise = voice(40), torch.randn(9, 30, M)
    audio = x.pop("audio")
    options = dict(x, steps=2, chunk=30, noise=noise)
    pieces = list(stream(tiny, audio, past=20, overlap=24, **options))
    assert [len(piece) for piece in pieces] == [6] * 6 + [4]
    silence = torch.zeros(20, 1, 160)
    voices = torch.cat([silence, audio])
    one = generate(tiny, voices[:30], **options)
    assert torch.allclose(pieces[0], one[20:26], atol=1e-5)
    two = generate(tiny, voices[6:36], **options | dict(prev=one[5], noise=noise[1:]))
    two[20:24].lerp_(one[26:30], torch.tensor([[1], [0.75], [0.5], [0.25]]))
    assert torch.allclose(pieces[1], two[20:26], atol=1e-5)
    assert not torch.allclose(two[19], one[25], atol=1e-2)     # what stays is not drawn again


# ---------------------------------------------------------------------------------- straight models
def test_reflow_makes_paths_straight():
    """After some steps on its teacher's pairs, a student's two steps end nearer to where its eight
    do, and to where the teacher's guided eight do."""
    teacher, student = build.model(cfg_both=1.0), build.model()
    student.load_state_dict(teacher.state_dict())
    conditions = dict(audio=torch.randn(4, 12, 1, 160), emotion=torch.arange(4),
                      identity=torch.randn(4, 63), prev=torch.randn(4, M))
    none = torch.zeros(4, dtype=bool)
    batch = dict(conditions, t=torch.rand(4), eps=torch.randn(4, 12, M), drop_audio=none,
                 drop_emotion=none)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    student.cfg.cfg_both = 0.0
    guided = partial(guided_velocity, teacher, guidance=guidance_of(teacher.cfg), **conditions)
    usual = euler(guided, batch["eps"], euler_times(10))

    @torch.no_grad()
    def apart():
        """Two steps from ten, and from the teacher's ten."""
        own = partial(guided_velocity, student, guidance={}, **conditions)
        two, ten = [euler(own, batch["eps"], euler_times(n, straight=True)) for n in (2, 10)]
        return (two - ten).norm(), (two - usual).norm()
    before = apart()
    for _ in range(30):
        pairs = reflow(teacher, student, batch | dict(t=torch.rand(4)))
        assert torch.equal(pairs["z0"], usual)
        sum(losses(student, **pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = apart()
    assert after[0] < 0.6 * before[0] and after[1] < 0.9 * before[1], (before, after)


def test_a_student_learns_at_t_1_or_from_where_its_own_step_led():
    """Half of the pairs begin at the noise itself; the place of the others on their line to z0 is
    the student's own, after one step from t = 1."""
    teacher, student = build.model(), build.model(**STRAIGHT)
    conditions = dict(audio=torch.randn(8, 12, 1, 160), emotion=torch.arange(8),
                      identity=torch.randn(8, 63), prev=torch.randn(8, M))
    eps = torch.randn(8, 12, M)
    batch = dict(conditions, eps=eps, t=torch.arange(8) / 8)
    pairs = reflow(teacher, student, batch)
    assert pairs["t"].tolist() == pytest.approx([0.2, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert torch.equal(pairs["eps"][4:], eps[4:])
    t = pairs["t"][:, None, None]
    with torch.no_grad():
        own = eps - (1 - t) * student(eps, torch.ones(8), **conditions)
        velocity = partial(guided_velocity, student, guidance={}, **conditions)
        two = euler(velocity, eps, euler_times(2, straight=True))
    assert torch.allclose((1 - t) * pairs["z0"] + t * pairs["eps"], own, atol=1e-5)
    assert torch.equal(reflow(student, student, batch)["z0"], two)     # a student can teach again


def test_a_straight_model_takes_two_steps_without_guidance(monkeypatch, capsys):
    model, x = build.model(**STRAIGHT), voice(30)
    two = generate(model, **x, steps=2, guidance={})
    assert torch.equal(generate(model, **x), two)
    assert not torch.equal(generate(model, **x, guidance={"audio": 1.0}), two)
    assert euler_times(2, straight=True).tolist() == [1, 0.25]
    monkeypatch.setattr(sample.MoDA, "from_pretrained", lambda path: model)
    for given, lines in ({}, 0), ({"steps": 4}, 0), ({"cfg_audio": 1.0}, 1):
        settings = sample.Settings(stats="", **given)
        model.std += 1                             # it has statistics
        sample.open_model(settings, given)
        expected = {"steps": 0, "cfg_audio": 0.0} | given
        assert expected.items() <= vars(settings).items()
        assert capsys.readouterr().err.count("warning") == lines
