"""Windows per second that a prepared data set delivers from the page cache, and what memory does meanwhile.

    python tests/bench_loader.py --data_dir=bench [--clips=24] [--frames=1500] [--seconds=10]

Makes data sets of random numbers with log-mel (1 x 160) and with wav2vec 2.0 (12 x 768) features below data_dir. Toy
training takes about 45 windows a second.
"""
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Clips, parse_flags, run, write_manifest, write_safetensors


def make(folder, clips, frames, features):
    (folder / "clips").mkdir(parents=True)
    rows = [dict(file=f"clips/{k}.safetensors", emotion=8, split="train") for k in range(clips)]
    for row in rows:
        clip = dict(motion=torch.randn(frames, 70), audio=torch.randn(frames, *features).half(), identity=torch.zeros(63))
        write_safetensors(clip, folder / row["file"])
    write_manifest(dict(clips=rows, moments=[[1] * 70] * 2), folder / "manifest.json")


def memory(kind):
    """Megabytes of this process and its children: RssAnon is its own, RssFile the page cache it looks at."""
    own, total = str(os.getpid()), 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        if own in (lines["Pid"].strip(), lines["PPid"].strip()) and kind in lines:
            total += int(lines[kind].split()[0]) / 1024
    return total


def measure(data, workers, seconds):
    chance = torch.Generator().manual_seed(0)
    index = iter(lambda: torch.randint(len(data), (8,), generator=chance).tolist(), None)
    loader = iter(DataLoader(data, batch_sampler=index, num_workers=workers))
    for _ in range(20):
        next(loader)
    began, n, seen = time.perf_counter(), 0, []
    while (spent := time.perf_counter() - began) < seconds:
        next(loader)
        n += 8
        if spent > len(seen) * seconds / 5:
            seen.append(f"{memory('RssAnon'):.0f}+{memory('RssFile'):.0f}")
    window = 81 * (70 * 4 + np.prod(data.audio_shape) * 2)                   # bytes on disk
    print(f"{data.audio_shape} workers {workers}: {n / spent:7.0f} windows/s, {n / spent * window / 1e6:6.0f} MB/s read; "
          f"memory, own+mapped MB: {' '.join(seen)}", flush=True)


def main(argv):
    flags = parse_flags("", argv, dict(data_dir="bench", clips=24, frames=1500, seconds=10.0))
    torch.set_num_threads(1)
    for features in ((1, 160), (12, 768)):
        folder = Path(flags["data_dir"], "x".join(map(str, features)))
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, flags["clips"], flags["frames"], features)
        began = time.perf_counter()
        data = Clips.open(folder)
        print(f"{features}: {flags['clips']} clips opened and checked in {time.perf_counter() - began:.3f} s")
        for workers in (0, 2):
            measure(data, workers, flags["seconds"])
        shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
