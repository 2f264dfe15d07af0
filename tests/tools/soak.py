"""Does memory stay where it is? Voices of every length, emotion, chunk and step count, for as long
as asked, in one process; some videos are drawn, some voices go through an audio encoder.

    python tests/tools/soak.py --minutes=30

The largest requests come first, and memory that is free but kept for later does not count. Prints
resident memory each minute, and at the end its least and most after the warm-up, the first third.
If it grew by more than 5 %, the exit code is 1. Flags:
"""
import ctypes
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# else it keeps a kernel per length it has met, 1,024 of them
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"

import numpy as np
import soundfile
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import build
from data import FRAME, RATE, Sound, log_mel_blocks, parse_flags, run
from moda import EMOTIONS, M, Config, MoDA, stream
from renderer import Sketch
from sample import write_video

LARGEST = 4                      # so many requests are as large as any after them


@dataclass
class Settings:
    minutes: float = 30.0        # of requests
    width: int = 64              # of the networks


def megabytes():
    """Resident memory, after what is free but kept for later went back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def voice(rng, frames):
    """Noise, in pieces."""
    seed = rng.randrange(2 ** 32)
    wav = np.random.default_rng(seed).normal(0, 0.1, frames * FRAME).astype(np.float32)
    return np.split(wav, range(5000, len(wav), 5000))


def small_models(width, folder):
    """What turns sound into features, and a small MoDA for them: log-mel, and an encoder."""
    def model(layers, dim):
        cfg = Config(width, heads=2, n_four=1, n_two=1, n_one=2, audio_layers=layers, audio_dim=dim)
        return MoDA(cfg).eval()
    sizes = build.SMALL_ENCODER
    encoder = build.SmallEncoder.from_pretrained(build.encoder(folder, "small"))
    return [(log_mel_blocks, model(1, 160)),
            (encoder.blocks, model(sizes["depth"], sizes["width"]))]


def request(rng, large):
    """Frames of a voice, mostly few, and how to sample its motion."""
    frames = 3000 if large else int(3000 ** rng.random())
    chunk = 120 if large else rng.choice([40, 80, 100, 120])
    return frames, dict(
        chunk=chunk,
        overlap=rng.randrange(chunk // 2),
        steps=4 if large else rng.randint(1, 4),
        smooth=chunk == 80,
        emotion=rng.randrange(len(EMOTIONS)),
        seed=rng.randrange(10 ** 9),
        guidance={"audio": rng.random()})


def drawn(face, motion, folder):
    """A video of at most 50 frames -> the frames of its sound."""
    source = face.source()
    frames = face.frames(source, source.motion + 0.01 * next(motion)[:50])
    path = folder / "video.mp4"
    write_video(path, frames, Sound(folder / "voice.wav"))
    return sum(map(len, Sound(path))) // FRAME


def work(rng, width, folder):
    """Endless: one request after the other, each time how many frames it had."""
    face, models = Sketch(), small_models(width, folder)
    for k in itertools.count():
        features, model = models[k % 2]
        frames, options = request(rng, large=k < LARGEST)
        sound = features(voice(rng, frames))
        sound = itertools.chain.from_iterable(sound)
        motion = stream(model, sound, torch.randn(63), torch.zeros(M), **options)
        if rng.random() < 0.3:
            yield drawn(face, motion, folder)
        else:
            yield sum(map(len, motion))


def soak(settings, folder):
    """Resident memory after each request that followed the warm-up."""
    began, minute, frames, after = time.monotonic(), 0, 0, []
    for k, done in enumerate(work(random.Random(1), settings.width, folder), 1):
        minutes = (time.monotonic() - began) / 60
        ended = minutes >= settings.minutes
        frames += done
        if minutes > settings.minutes / 3:
            after.append(megabytes())
        if minutes >= minute or ended:
            print(f"minute {minute}: {megabytes():.1f} MB, {k} voices, {frames} frames", flush=True)
            minute += 1
        if ended:
            return after


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/voice.wav", np.zeros(2 * RATE), RATE)
        after = soak(settings, Path(folder))
    tenth = 1 + len(after) // 10
    growth = np.mean(after[-tenth:]) / np.mean(after[:tenth])
    print(f"after the warm-up {min(after):.1f} to {max(after):.1f} MB, ratio "
          f"{max(after) / min(after):.3f}; last tenth over first {growth:.3f}")
    if growth > 1.05:
        raise MemoryError(f"memory grew by {growth - 1:.1%}")


if __name__ == "__main__":
    run(main)
