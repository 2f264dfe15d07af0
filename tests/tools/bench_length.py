"""Cost and memory of the toy's motion for voices of any length, in pieces of a minute and in tiny
ones.

    python tests/tools/bench_length.py --minutes=1,10,60

One thread, log-mel features, a made-up voice over and over. Prints the seconds, the most memory so
far after a minute and at the end, and whether both ways of cutting the sound give the same bits; if
not, the exit code is 1. Flags:
"""
import hashlib
import resource
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import RATE, log_mel_blocks, parse_flags, run, toy_clip
from moda import M, MoDA, stream


@dataclass
class Settings:
    minutes: str = "1,10,60"     # of the voices
    ckpt: str = "out/toy/ckpt.pt"  # a MoDA trained on log-mel features


def sound(wav, seconds, size):
    """A voice over and over, in pieces of `size` samples."""
    end = seconds * RATE
    for at in range(0, end, size):
        yield np.take(wav, np.arange(at, min(at + size, end)), mode="wrap")


def measure(model, wav, minutes, size):
    """Print cost and memory of one voice -> a hash of its motion."""
    began = time.process_time()
    frames, memory, bits = 0, [], hashlib.sha256()
    features = log_mel_blocks(sound(wav, 60 * minutes, size))
    frames_of_sound = chain.from_iterable(features)
    for motion in stream(model, frames_of_sound, torch.zeros(63), torch.zeros(M), emotion=4):
        bits.update(motion.numpy().tobytes())
        frames += len(motion)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    first_minute = memory[:17]                     # pieces of 84 frames
    print(f"{minutes} min in pieces of {size}: {frames} frames, "
          f"{time.process_time() - began:.1f} s of one core, at most {first_minute[-1]:.0f} MB in "
          f"the first minute, {memory[-1]:.0f} in all", flush=True)
    return bits.hexdigest()


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    torch.set_num_threads(1)
    model = MoDA.from_pretrained(settings.ckpt)
    wav, *_ = toy_clip(3, 250)
    for minutes in map(int, settings.minutes.split(",")):
        whole = measure(model, wav, minutes, 60 * RATE)
        cut = measure(model, wav, minutes, 777)
        if whole != cut:
            raise ValueError(f"{minutes} min: the motion depends on how the sound is cut")
        print("the same bits")


if __name__ == "__main__":
    run(main)
