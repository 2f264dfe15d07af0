"""Cost and memory of the toy's motion for voices of any length, heard in pieces of a minute and in tiny ones.

    python tests/bench_length.py [--minutes=1,10,60] [--ckpt=out/toy/ckpt.pt]

One thread, log-mel features, a made-up voice over and over. Prints the seconds, the most memory so far
after a minute and at the end, and whether both ways of cutting the sound give the same bits; exit code 1 if not.
"""
import hashlib
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import RATE, log_mel_blocks, parse_flags, require, run, toy_clip
from moda import M, MoDA, stream


def sound(wav, seconds, size):
    for at in range(0, seconds * RATE, size):
        yield np.take(wav, np.arange(at, min(at + size, seconds * RATE)), mode="wrap")


def measure(model, wav, minutes, size):
    began, frames, memory, bits = time.process_time(), 0, [], hashlib.sha256()
    for part in stream(model, log_mel_blocks(sound(wav, 60 * minutes, size)), torch.zeros(63), torch.zeros(M), 4):
        bits.update(part.numpy().tobytes())
        frames += len(part)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(f"{minutes} min in pieces of {size}: {frames} frames, {time.process_time() - began:.1f} s of one core, "
          f"at most {memory[min(len(memory), 17) - 1]:.0f} MB in the first minute, {memory[-1]:.0f} in all", flush=True)
    return bits.hexdigest()


def main(argv):
    flags = parse_flags("    --minutes=1,10,60\n    --ckpt=out/toy/ckpt.pt", argv)
    torch.set_num_threads(1)
    model, wav = MoDA.from_pretrained(flags["ckpt"]), toy_clip(3, 250)[0]
    for minutes in map(int, flags["minutes"].split(",")):
        whole, cut = (measure(model, wav, minutes, size) for size in (60 * RATE, 777))
        require(whole == cut, f"{minutes} min: the motion depends on how the sound is cut")
        print("the same bits")


if __name__ == "__main__":
    run(main)
