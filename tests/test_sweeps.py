"""Whatever length, chunk, overlap, steps, guidance and seed are drawn, the motion has the voice's length, is finite, is
the same each time, and the same to the bit however the voice arrives."""
import random

import pytest
import torch

from moda import EMOTIONS, M, sample, stream

KEYS = "audio", "emotion", "audio+emotion", "emotion+audio"


pytestmark = pytest.mark.usefixtures("one_thread")          # small tensors gain nothing from more


def draw(chance):
    """A voice of 1 to 2,000 frames, mostly short, and a request that makes sense."""
    T = int(2000 ** chance.random() ** 2)
    chunk = chance.choice([1, 2, chance.randint(3, 40), chance.randint(40, 130)]) if T < 50 else chance.randint(60, 130)
    request = dict(
        chunk=chunk, overlap=chance.choice([0, chance.randrange(chunk) // 2, chunk - 1 if T < 20 else 0]),
        steps=chance.choice([1, 1, 2, 3, [1.0], [1.0, 0.4, 0.05]]), smooth=chance.random() < 0.5,
        guidance={key: chance.uniform(-0.5, 3) for key in chance.sample(KEYS, chance.randrange(3))},
        seed=chance.randrange(2 ** 63), emotion=chance.randrange(len(EMOTIONS)))
    return T, request


def pieces(audio, chance):
    """The voice as it might arrive: in pieces of any size, also empty ones, and frame by frame for a while."""
    at = 0
    while at < len(audio):
        n = chance.choice([0, 1, 1, chance.randint(1, 50), chance.randint(1, 300)])
        yield audio[at:at + n]
        at += n


@pytest.mark.parametrize("k", range(45))
def test_a_request_of_any_kind_is_answered_whole_and_the_same_each_time(tiny, k):
    chance = random.Random(k)
    T, request = draw(chance)
    given = dict(identity=torch.randn(63), prev=torch.randn(M)) | request
    audio = torch.randn(T, 1, 160)
    made = sample(tiny, audio, **given)
    assert made.shape == (T, M) and made.isfinite().all(), (T, request)
    parts = list(stream(tiny, pieces(audio, chance), **given))
    assert torch.equal(made, torch.cat(parts)), (T, request)
    assert all(len(part) == request["chunk"] - request["overlap"] for part in parts[:-2]), (T, request)


def test_lengths_of_every_size_are_drawn():
    lengths = [draw(random.Random(k))[0] for k in range(45)]
    assert min(lengths) == 1 and max(lengths) > 1000 and sorted(lengths)[22] < 100
