"""What reflow gains: teacher and straight student in 1, 2, 4 and 10 steps, long chunks and short.

    python tests/tools/straight.py --teacher=out/toy/ckpt.pt --student=out/toy-straight/ckpt.pt

The clips and metrics of sample.py --eval, the mean over seeds of the noise ± its standard
deviation. Beside the truth: the mouth, head motion and jerk. Beside the teacher's usual ten steps
from the same noise: distance over standard deviation, correlation of lips. Then how bent the paths
are in ten equal steps and in two from 1 and 1/4: the mean over t of |(eps - z0) - v(z_t, t)|^2 on
the way to z0; motion of short chunks, with the jump from frame to frame at their borders over the
99th percentile of all jumps; and the work between the last sound of a chunk and its motion, of both
models in turns. Flags:
"""
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import ToyTalker, parse_flags, run
from moda import (LIPS, M, MoDA, euler, euler_times, generate, guidance_of, guided_velocity,
                  stream)
from sample import beginnings, compare

CHUNKS = (100, 16, 0), (20, 5, 0), (10, 5, 0), (50, 45, 40)
COLUMNS = ["mouth corr", "mouth error", "head motion", "jerk, lips", "jerk, rotation",
           "jerk, translation", "jerk, scale"]


@dataclass
class Settings:
    teacher: str = "out/toy/ckpt.pt"
    student: str = "out/toy-straight/ckpt.pt"
    clips: int = 12              # unseen ones
    seeds: int = 3               # of the noise


def alike(a, b):
    """Correlation of lips, clip by clip: (K, T, 70) twice -> mean."""
    lips = torch.stack([a, b])[..., LIPS].flatten(2)                   # (2, K, T * 18)
    x, y = lips - lips.mean(2, keepdim=True)
    return torch.cosine_similarity(x, y).mean().item()


def jump(z, stride):
    """The mean step at a border between chunks over the 99th percentile of all steps."""
    steps = z.diff(dim=1).norm(dim=-1)
    return (steps[:, stride - 1::stride].mean() / steps.quantile(0.99)).item()


@torch.no_grad()
def bent(model, clips, seed, times):
    """Mean over t of |(eps - z0) - v(z_t, t)|^2 along the model's path, which ends at z0."""
    audio, identity, prev, emotion = clips
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(len(audio), 80, M, generator=generator)
    velocity = partial(guided_velocity, model, audio=audio[:, :80], identity=identity, prev=prev,
                       emotion=emotion, guidance=guidance_of(model.cfg))
    vs = []

    def noted(z, t):
        vs.append(velocity(z, t))
        return vs[-1]
    z0 = euler(noted, eps, times)
    errors = [(eps - z0 - v).square().mean() for v in vs]
    steps = torch.stack([*times, torch.tensor(0.0)]).diff().neg()
    return (torch.stack(errors) @ steps).item()


def delays(model, clip, **options):
    """Seconds of work from the last sound of each chunk to its motion, on one thread."""
    audio, *given = clip
    asked = []

    def frames():
        for frame in audio:
            asked.append(time.process_time())
            yield frame
    seconds = []
    for _ in stream(model, frames(), *given, smooth=model.cfg.smooth, **options):
        seconds.append(time.process_time() - asked[-1])
    return seconds[1:-1]                           # the first made tables, the last had no sound


def show(name, rows):
    cells = []
    for column in rows[0]:
        values = [float(row[column]) for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    teacher = MoDA.from_pretrained(settings.teacher)
    student = MoDA.from_pretrained(settings.student)
    talker = ToyTalker("val", settings.clips)
    truth, *clips = beginnings(talker, settings.clips, teacher)
    seeds = range(1, settings.seeds + 1)

    def speak(model, seed, **options):
        options = dict(smooth=model.cfg.smooth, seed=seed) | options
        return torch.stack([generate(model, *clip, **options) for clip in zip(*clips)])
    usual = [speak(teacher, seed) for seed in seeds]

    def beside(z, seed):
        row = compare(z, truth, teacher.std)
        row = {column: row[column] for column in COLUMNS}
        ten = usual[seed - 1]
        row["distance"] = (z - ten).square().mean().sqrt() / ten.std()
        return row | {"lips alike": alike(z, ten)}

    columns = [*COLUMNS, "distance", "lips alike"]
    print("|", " | ".join(["model, steps", *columns]), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, model in {"teacher": teacher, "student": student}.items():
        for steps in 1, 2, 4, 10:
            show(f"{name}, {steps}", [beside(speak(model, seed, steps=steps), seed)
                                      for seed in seeds])
    for name, model in {"teacher": teacher, "student": student}.items():
        for times in euler_times(10), euler_times(2, straight=True):
            bends = [bent(model, clips, seed, times) for seed in seeds]
            print(f"paths of the {name} in {len(times)} steps are bent by "
                  f"{statistics.mean(bends):.4f}", flush=True)
    print("|", " | ".join(["chunk/overlap/past", *columns, "jump at borders"]), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name, model in {"teacher": teacher, "student": student}.items():
        for chunk, overlap, past in CHUNKS:
            rows = []
            for seed in seeds:
                z = speak(model, seed, chunk=chunk, overlap=overlap, past=past)
                rows.append(beside(z, seed) | {"jump": jump(z, chunk - overlap)})
            show(f"{name}, {chunk}/{overlap}/{past}", rows)
    torch.set_num_threads(1)                       # seconds are of one processor, however busy
    for chunk, overlap, past in CHUNKS:
        waits = {teacher: [], student: []}
        for clip in zip(*clips):
            for model in waits:
                waits[model] += delays(model, clip, chunk=chunk, overlap=overlap, past=past)
        slow, fast = [1e3 * statistics.median(wait) for wait in waits.values()]
        print(f"{chunk}/{overlap}/{past}: motion {slow:.1f} ms after a chunk's last sound by the "
              f"teacher, {fast:.1f} ms by the student: {slow / fast:.1f} x less", flush=True)


if __name__ == "__main__":
    run(main)
