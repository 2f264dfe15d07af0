"""What reflow gains: teacher and straight student in 1, 2, 4 and 10 steps, long chunks and short.

    python tests/tools/straight.py --teacher=out/toy/ckpt.pt --student=out/toy-straight/ckpt.pt

Unseen toy clips; mean ± standard deviation over seeds of the noise. Beside the truth: correlation
and error of the mouth, error over variance; jerk of lips and head over the truth's. Beside the
teacher's usual ten steps from the same noise: distance over standard deviation, correlation of
lips. Then how bent the paths are, each model's own: the mean over t of |(eps - z0) - v(z_t, t)|^2;
and motion of short chunks, with the jump from frame to frame at their borders over the 99th
percentile of all jumps. Flags:
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import ToyTalker, parse_flags, run
from moda import (LIPS, M, MOUTH, SCALE, MoDA, generate, guidance_of, guided_velocity,
                  reflow)

HEAD = range(SCALE.start, M)
CHUNKS = (100, 16), (20, 5), (15, 5), (10, 5), (8, 3), (5, 0)


@dataclass
class Settings:
    teacher: str = "out/toy/ckpt.pt"
    student: str = "out/toy-straight/ckpt.pt"
    clips: int = 6               # unseen ones
    seeds: int = 2               # of the noise


def correlation(a, b):
    """Of the channels of two motions, clip by clip: (K, T, c) twice -> mean."""
    return statistics.mean(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
                           for x, y in zip(a, b))


def jerk(z, truth, channels):
    shakes = [x[..., channels].diff(3, dim=1).abs().mean() for x in (z, truth)]
    return (shakes[0] / shakes[1]).item()


def jump(z, chunk, overlap):
    """The mean step at a border between chunks over the 99th percentile of all steps."""
    steps = z.diff(dim=1).norm(dim=-1)
    stride = chunk - overlap
    return (steps[:, stride - 1::stride].mean() / steps.quantile(0.99)).item()


def beside(z, truth, usual):
    mouth, true_mouth = z[..., [MOUTH]], truth[..., [MOUTH]]
    error = (mouth - true_mouth).square().mean() / true_mouth.var()
    distance = (z - usual).square().mean().sqrt() / usual.std()
    return {
        "mouth corr": correlation(mouth, true_mouth),
        "mouth error": error.item(),
        "jerk, lips": jerk(z, truth, LIPS),
        "jerk, head": jerk(z, truth, HEAD),
        "distance": distance.item(),
        "lips alike": correlation(z[..., LIPS], usual[..., LIPS])}


@torch.no_grad()
def bent(model, clips, seed):
    """Mean over t of |(eps - z0) - v(z_t, t)|^2, z0 being where the model's own path ends."""
    audio, identity, prev, emotion = clips
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(len(audio), 80, M, generator=generator)
    given = dict(audio=audio[:, :80], identity=identity, prev=prev, emotion=emotion)
    batch = dict(given, eps=eps, t=torch.ones(len(audio)))
    z0 = reflow(model, batch)["z0"][:len(audio)]
    errors = []
    for t in torch.arange(0.05, 1, 0.1):
        z_t = (1 - t) * z0 + t * eps
        v = guided_velocity(model, z_t, t, guidance=guidance_of(model.cfg), **given)
        errors.append((eps - z0 - v).square().mean().item())
    return statistics.mean(errors)


def show(name, rows):
    cells = []
    for column in rows[0]:
        values = [row[column] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    teacher = MoDA.from_pretrained(settings.teacher)
    student = MoDA.from_pretrained(settings.student)
    talker = ToyTalker("val", settings.clips)
    motion, audio, identity = torch.utils.data.default_collate(talker.clips)
    prev, truth = teacher.normalise(motion).tensor_split([1], 1)
    clips = audio[:, 1:], identity, prev[:, 0], torch.tensor(talker.emotion)
    seeds = range(1, settings.seeds + 1)

    def speak(model, seed, **options):
        options = dict(smooth=model.cfg.smooth, seed=seed) | options
        return torch.stack([generate(model, *clip, **options) for clip in zip(*clips)])
    usual = [speak(teacher, seed, steps=10) for seed in seeds]
    columns = list(beside(truth, truth, usual[0]))
    print("|", " | ".join(["model, steps", *columns, "seconds per second"]), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name, model in {"teacher": teacher, "student": student}.items():
        for steps in 1, 2, 4, 10:
            rows = []
            for seed in seeds:
                began = time.perf_counter()
                z = speak(model, seed, steps=steps)
                seconds = (time.perf_counter() - began) / (truth[..., 0].numel() / 25)
                rows.append(beside(z, truth, usual[seed - 1]) | {"seconds": seconds})
            show(f"{name}, {steps}", rows)
    for name, model in {"teacher": teacher, "student": student}.items():
        bends = [bent(model, clips, seed) for seed in seeds]
        print(f"paths of the {name} are bent by {statistics.mean(bends):.4f}", flush=True)
    print("|", " | ".join(["student, chunk/overlap", *columns, "jump at borders"]), "|")
    for chunk, overlap in CHUNKS:
        rows = []
        for seed in seeds:
            z = speak(student, seed, chunk=chunk, overlap=overlap)
            at_borders = jump(z, chunk, overlap)
            rows.append(beside(z, truth, usual[seed - 1]) | {"jump": at_borders})
        show(f"{chunk}/{overlap}", rows)


if __name__ == "__main__":
    run(main)
