"""Whatever length, chunk, overlap, steps, guidance and seed are drawn, the motion is as long as the
voice, finite, the same each time, and the same to the bit when the voice comes frame by frame."""
import random

import pytest
import torch

from moda import EMOTIONS, M, generate, stream

CONDITIONS = "audio", "emotion", "audio+emotion"
pytestmark = pytest.mark.usefixtures("one_thread")     # small tensors gain nothing from more


def draw(rng):
    """A voice of 1 to 2,000 frames, mostly short, and a valid request."""
    T = int(2000 ** rng.random() ** 2)
    chunk = rng.randint(60, 130)
    if T < 50:
        chunk = rng.choice([1, 2, rng.randint(3, 40), rng.randint(40, 130)])
    largest = chunk - 1 if T < 20 else 0
    overlap = rng.choice([0, rng.randrange(chunk) // 2, largest])
    conditions = rng.sample(CONDITIONS, rng.randrange(3))
    request = dict(
        chunk=chunk,
        overlap=overlap,
        past=rng.choice([0, overlap // 2, overlap]),
        steps=rng.choice([1, 1, 2, 3]),
        smooth=rng.random() < 0.5,
        guidance={condition: rng.uniform(-0.5, 3) for condition in conditions},
        seed=rng.randrange(2 ** 63),
        emotion=rng.randrange(len(EMOTIONS)))
    return T, request


@pytest.mark.parametrize("k", range(30))
def test_any_valid_request_is_answered_whole_and_the_same_each_time(tiny, k):
    T, request = draw(random.Random(k))
    given = dict(request, identity=torch.randn(63), prev=torch.randn(M))
    audio = torch.randn(T, 1, 160)
    motion = generate(tiny, audio, **given)
    assert motion.shape == (T, M), (T, request)
    assert motion.isfinite().all(), (T, request)
    parts = list(stream(tiny, iter(audio), **given))
    assert torch.equal(motion, torch.cat(parts)), (T, request)
    stride = request["chunk"] - request["overlap"]
    assert all(len(part) == stride for part in parts[:-2]), (T, request)


def test_lengths_of_every_size_are_drawn():
    lengths = sorted(draw(random.Random(k))[0] for k in range(30))
    assert lengths[0] == 1
    assert lengths[15] < 100
    assert lengths[-1] > 1000
