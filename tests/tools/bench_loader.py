"""Windows per second that a prepared data set delivers from the page cache, and memory meanwhile.

    python tests/tools/bench_loader.py --data_dir=bench

Makes data sets with log-mel (1 x 160) and with wav2vec 2.0 (12 x 768) features below data_dir, and
removes them. Prints the seconds to open each, then windows per second, with one reading thread and
with two. The toy's training takes about 30 windows a second. Flags:
"""
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import build
from data import Clips, parse_flags, read_ahead, run
from moda import Config


@dataclass
class Settings:
    data_dir: str = "bench"      # an empty or new folder
    clips: int = 24              # of each data set
    frames: int = 1500           # of each clip, a minute
    batch_size: int = 64         # windows of a step, in this process
    seconds: float = 10.0        # of each measurement


def memory(kind):
    """Megabytes of this process: RssAnon is its own, RssFile the page cache."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+)", status)[1]) / 1024


def measure(data, workers, settings):
    """Print windows and bytes per second of what train.py reads, and the memory at five moments."""
    training = SimpleNamespace(seed=1, batch_size=settings.batch_size, workers=workers, steps=10**6)
    model = SimpleNamespace(cfg=Config(), mean=torch.zeros(1))
    batches = read_ahead(data, model, training, range(training.steps))
    for _ in range(5):
        next(batches)
    began, n, spent, seen = time.perf_counter(), 0, 0.0, []
    while spent < settings.seconds:
        next(batches)
        n += settings.batch_size
        spent = time.perf_counter() - began
        if spent > len(seen) * settings.seconds / 5:
            seen.append(f"{memory('RssAnon'):.0f}+{memory('RssFile'):.0f}")
    window = 81 * (70 * 4 + np.prod(data.audio_shape) * 2)             # bytes on disk
    print(f"{data.audio_shape} workers {workers}: {n / spent:7.0f} windows/s, "
          f"{n / spent * window / 1e6:6.0f} MB/s read; memory, own+mapped MB: {' '.join(seen)}",
          flush=True)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    torch.set_num_threads(1)
    for audio_shape in (1, 160), (12, 768):
        folder = Path(settings.data_dir, "x".join(map(str, audio_shape)))
        shutil.rmtree(folder, ignore_errors=True)
        build.data_set(folder, [settings.frames] * settings.clips, audio_shape)
        began = time.perf_counter()
        data = Clips(folder)
        seconds = time.perf_counter() - began
        print(f"{audio_shape}: {settings.clips} clips opened in {seconds:.3f} s")
        for workers in 1, 2:
            measure(data, workers, settings)
        shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
