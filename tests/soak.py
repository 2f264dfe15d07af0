"""Does memory stay where it is? Voices of every length, emotion, chunk and step count, for as long as asked, in one
process; some films are drawn, some voices go through an audio encoder.

    python tests/soak.py --minutes=30 [--width=64]

The largest requests come first, and memory that is free but kept for later does not count. Prints resident memory each
minute, and at the end its least and most after the warm-up, the first third; exit code 1 if it grew by more than 5 %.
"""
import ctypes
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"     # or it keeps a kernel per length it has met, 1,024 of them

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import build
from data import HOP, AudioEncoder, audio_blocks, log_mel_blocks, parse_flags, run
from moda import EMOTIONS, M, Config, MoDA, stream
from renderer import Sketch
from sample import write_video


def megabytes():
    """Resident memory, after what is free but kept for later went back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def voice(chance, longest):
    """Noise in pieces, 1 to 3,000 frames of it, mostly few."""
    frames = 3000 if longest else int(3000 ** chance.random())
    wav = np.random.default_rng(chance.randrange(2 ** 32)).normal(0, 0.1, frames * HOP)
    return np.split(wav.astype(np.float32), range(5000, len(wav), 5000))


def requests(chance, width, folder):
    """Endless: what was done, each time a number of frames."""
    face, models = Sketch(), {}
    ears = AudioEncoder.from_pretrained(build.encoder(folder, "small"))
    for hear, shape in (log_mel_blocks, (1, 160)), (ears.blocks, (ears.depth, ears.width)):
        models[hear] = MoDA(Config(width, 2, 1, 1, 2, audio_layers=shape[0], audio_dim=shape[1])).eval()
    neutral = face.source().motion
    for k in itertools.count():
        hear, chunk = [*models][k % 2], 120 if k < 4 else chance.choice([40, 80, 100, 120])
        given = dict(chunk=chunk, overlap=chance.randrange(chunk // 2), steps=4 if k < 4 else chance.randint(1, 4),
                     smooth=chunk == 80, emotion=chance.randrange(len(EMOTIONS)), seed=chance.randrange(10 ** 9),
                     guidance={"audio": chance.random()})
        parts = stream(models[hear], hear(voice(chance, k < 4)), torch.randn(63), torch.zeros(M), **given)
        motion = (neutral + 0.01 * part for part in parts)
        if chance.random() < 0.3:                                            # a film of at most 2 s
            shown = itertools.islice(motion, 1)
            frames = (frame for part in shown for frame in face.frames(face.source(), part[:50]))
            write_video(folder / "v.mp4", frames, folder / "v.wav")
            yield sum(map(len, audio_blocks(folder / "v.mp4"))) // HOP
        else:
            yield sum(map(len, motion))


def main(argv):
    flags = parse_flags("    --minutes=30.0\n    --width=64", argv)
    chance, began, minute, after, done = random.Random(1), time.monotonic(), 0, [], 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/v.wav", np.zeros(32000), 16000)
        for k, frames in enumerate(requests(chance, flags["width"], Path(folder))):
            share, done = (time.monotonic() - began) / 60 / flags["minutes"], done + frames
            if share > 1 / 3:
                after.append(megabytes())
            if share * flags["minutes"] >= minute or share >= 1:
                print(f"minute {minute}: {megabytes():.1f} MB, {k + 1} voices, {done} frames", flush=True)
                minute += 1
            if share >= 1:
                break
    growth = np.mean(after[-len(after) // 10:]) / np.mean(after[:1 + len(after) // 10])
    print(f"after the warm-up {min(after):.1f} to {max(after):.1f} MB, ratio {max(after) / min(after):.3f}; "
          f"last tenth over first {growth:.3f}")
    if growth > 1.05:
        raise MemoryError(f"memory grew by {growth - 1:.1%}")


if __name__ == "__main__":
    run(main)
