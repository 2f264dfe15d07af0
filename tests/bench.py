"""How fast this machine samples, listens and renders: the table of `python sample.py --bench`.

    python sample.py --bench [--weights=pretrained_weights] [--audio_encoder=FOLDER] [--steps=10] [--device=cuda]

One window is 80 frames, 3.2 s of film, by the full model with the released model's guidance. What is timed takes turns
with what it is compared to, and with matrix products, two seconds of them, that show what the machine can do at that
moment; a row is the median. The renderer is compared to convolutions, where they are faster. Work is counted as a plain
implementation does it, 206.8 GFLOP a step: exact algebra counts as speed. The last row adds the fastest of each stage.
Without weights, numbers of our own stand in. --compile compiles the renderer, and adds a row for motion (minutes).
"""
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import build
import moda
import renderer
from data import RATE, AudioEncoder
from moda import Config, JointBlock, M, MoDA, SingleBlock, modulate, split_heads

N, GUIDANCE, WORK = 80, {"audio+emotion": 0.2}, 206.8e9                    # FLOP a step, 2 passes x 4 x 80 tokens
FRAME_WORK = 1233.6e9                                                      # W + G of one frame


class PlainJointBlock(JointBlock):
    """All N copies of equal tokens, one attention after the concatenation of everything."""

    def forward(self, xs, mods, table, heard=None):
        N, mods = xs[0].size(1), mods.unflatten(0, (len(xs), 6))
        tables = [table if len(xs) == 2 or s < 2 else table[:1].expand_as(table) for s in range(len(xs))]
        xs = [x.expand(-1, max(N, x.size(1)), -1) for x in xs]
        qkv = [f(modulate(x, m[0], m[1])) for f, x, m in zip(self.qkv, xs, mods)]
        q, k, v = (torch.cat(ys, 2) for ys in zip(*map(split_heads, qkv, self.qk_gain, tables)))
        ys = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).split([x.size(1) for x in xs], 1)
        xs = [x + m[2] * f(y) for f, x, y, m in zip(self.out, xs, ys, mods)]
        return [x + m[5] * f(modulate(x, m[3], m[4])) for f, x, m in zip(self.mlp, xs, mods)]


class PlainSingleBlock(SingleBlock):
    def forward(self, x, mods, table, heard=None, keep=None):
        return super().forward(x, mods, table)[:, :keep]


@torch.inference_mode()
def plain_loop(model, audio, identity, prev, emotion, steps, noise):
    """One window as the equations say it: every step calls the whole network, once for each pass."""
    z, rows = noise, moda.guidance_passes(GUIDANCE, emotion)
    for k in range(steps):
        row = lambda x: torch.as_tensor(x, device=noise.device)[None]
        z = z - sum(weight * model(z[None], row(1 - k / steps), row(audio), row(e), row(identity), row(prev), row(drop))[0]
                    for weight, drop, e in rows) / steps
    return z


def timed(run):
    began = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peak(device, dtype, convolutions=False, seconds=2):
    """FLOP/s that large matrix products sustain for as long, or convolutions like the renderer's if faster."""
    n, batch = (8192, 8) if device.type == "cuda" else (2048, 1)
    a, x, weight = (torch.randn(shape, device=device).to(dtype) for shape in
                    ((n, n), (batch, 512, 64, 64), (512, 512, 3, 3)))

    def sustained(work, run):
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            timed(run)
            count += 1
        return count * work / (time.perf_counter() - began)
    products = sustained(2 * n ** 3, lambda: a @ a)
    if not convolutions:
        return products
    return max(products, sustained(2 * batch * 64 ** 2 * weight.numel(), lambda: F.conv2d(x, weight, padding=1)))


def knows_bfloat16(device):
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def full_model(device):
    """The released model's size; small random weights, so that every gate is open."""
    with torch.device("meta"):
        model = MoDA(Config(rope_streams=2))
    model.to_empty(device=device).requires_grad_(False).eval()
    for p in model.parameters():
        p.normal_(std=0.02)
    model.mean.zero_()
    model.std.fill_(1)
    return model


def compare(runs, peaks, n):
    """{name: run} in turns, n times after a first one -> medians of the seconds and of the peaks, last results."""
    times, tops, results = {name: [] for name in runs}, {name: [] for name in runs}, {}
    for _ in range(n + 1):
        for name, run in runs.items():
            tops[name].append(peaks[name]())
            seconds, results[name] = timed(run)
            times[name].append(seconds)
    median = lambda rows: {name: statistics.median(row[1:]) for name, row in rows.items()}
    return median(times), median(tops), results


def row(name, seconds, frames, work=0.0, top=0.0, remark=""):
    rates = f"{work / seconds / 1e9:>9.0f} GFLOP/s {work / seconds / top:>6.2f} of peak" if work else " " * 29
    print(f"{name:28}{1e3 * seconds / frames * N:>10.0f} ms {seconds / frames * 25:>9.4f} x {rates}  {remark}", flush=True)


def sampling(device, steps, turns, compiled):
    """Rows for motion -> seconds of our fastest window."""
    model = full_model(device)
    torch.manual_seed(0)
    audio, identity, prev, noise = torch.randn(N, 12, 768), torch.randn(63), torch.randn(M), torch.randn(N, M)
    x = [y.to(device) for y in (audio, identity, prev)]
    ours = lambda model: moda.sample(model, audio, identity, prev, 4, steps, GUIDANCE, chunk=N, noise=noise[None])
    plain_model = full_model(device)
    plain_model.load_state_dict(model.state_dict(), assign=True)           # the same memory
    for block in plain_model.modules():
        block.__class__ = {JointBlock: PlainJointBlock, SingleBlock: PlainSingleBlock}.get(type(block), type(block))
    runs = {"motion, plain loop": lambda: plain_loop(plain_model, *x, 4, steps, noise.to(device)).cpu(),
            "motion": lambda: ours(model)}
    peaks = dict.fromkeys(runs, functools.partial(peak, device, torch.float32))
    if knows_bfloat16(device):
        half = full_model(device)
        for p, q in zip(half.parameters(), model.parameters()):
            p.data = q.data.bfloat16()
        runs["motion, bfloat16"] = lambda: ours(half)
        peaks["motion, bfloat16"] = functools.partial(peak, device, torch.bfloat16)
    if compiled and device.type == "cpu":
        fast = full_model(device)
        fast.load_state_dict(model.state_dict(), assign=True)
        fast.fuse = torch.compile(fast.fuse, dynamic=False)
        runs["motion, compiled"], peaks["motion, compiled"] = lambda: ours(fast), peaks["motion"]
    if device.type == "cuda":
        fast = full_model(device)
        fast.load_state_dict(half.state_dict(), assign=True)
        fast.fuse = torch.compile(fast.fuse, mode="reduce-overhead", dynamic=False)
        runs["motion, bfloat16, compiled"] = lambda: ours(fast)
        peaks["motion, bfloat16, compiled"] = peaks["motion, bfloat16"]
    seconds, tops, results = compare(runs, peaks, turns)
    for name in runs:
        error = (results[name] - results["motion, plain loop"]).abs().max()
        ratio = seconds["motion, plain loop"] / seconds[name]
        row(name, seconds[name], N, steps * WORK, tops[name], f"{ratio:.2f} x the plain loop, deviates by {error:.0e}")
    return min(seconds.values())


def bench(flags):
    device = flags["device"]
    print(torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
          f"torch {torch.__version__}; per window of {N} frames, and in real time; matrix products reach",
          f"{peak(device, torch.float32) / 1e9:.0f} GFLOP/s in float32", flush=True)
    if not knows_bfloat16(device):
        print("this processor has no bfloat16 arithmetic: its rows are left out")
    if device.type == "cuda":
        torch.cuda.set_device(device)                                      # what is timed waits for this one
    turns = 10 if device.type == "cuda" else 3
    motion = sampling(device, flags["steps"], turns, flags["compile"])
    with tempfile.TemporaryDirectory() as folder:
        encoder = AudioEncoder.from_pretrained(flags["audio_encoder"] or build.encoder(folder), device)
        weights = flags["weights"] or build.liveportrait(folder)
        faces = {"renderer": renderer.LivePortrait(weights, device)}
        if knows_bfloat16(device):
            faces["renderer, bfloat16"] = renderer.LivePortrait(weights, device, torch.bfloat16)
    wav = np.random.default_rng(0).standard_normal(N * RATE // 25).astype(np.float32)
    hear = statistics.median(timed(lambda: encoder(wav))[0] for _ in range(turns + 1))
    row("audio encoder", hear, N)
    source = faces["renderer"].source(np.full((512, 512, 3), 128, np.uint8))
    n = 80 if device.type == "cuda" else 2
    frames, fastest = source.motion + 0.001 * torch.randn(n, M), float("inf")
    for name, face in faces.items():
        if flags["compile"]:
            face.render = torch.compile(face.render, dynamic=False)
        draw = min(timed(lambda: list(face.frames(source, frames)))[0] for _ in range(turns))
        row(name, draw, n, n * FRAME_WORK, peak(device, face.G.dtype, convolutions=True), f"{n / draw:.3f} frames/s")
        fastest = min(fastest, draw)
    row("end to end, stages added", hear + motion + fastest / n * N, N)
