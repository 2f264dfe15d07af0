"""How fast this machine generates motion, encodes audio and renders: a table.

    python tests/tools/bench.py
    python tests/tools/bench.py --compile --weights=pretrained_weights --audio_encoder=FOLDER

One window is 80 frames, 3.2 s of video, by the full model with the released model's guidance. What
is timed takes turns with what it is compared to, and with matrix products, two seconds of them,
that show what the machine can do at that moment; a row is the median. The renderer is compared to
convolutions, where they are faster. A straight model's two steps are without guidance; they run
with the same weights, for the cost. Work is counted as a plain implementation does it, 206.8 GFLOP
a step: exact algebra counts as speed. The plain loop calls the whole network once for each pass of
Eq. 8 in every step. The last row adds the fastest of each stage. Without weights, numbers of our
own stand in. Flags:
"""
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import build
from data import RATE, AudioEncoder, find_device, parse_flags, run
from moda import NO_EMOTION, Config, M, MoDA, generate
from renderer import LivePortrait

N = 80                           # frames of a window
EMOTION = 4
SCALE = 0.2                      # of the guidance
GUIDANCE = {"audio+emotion": SCALE}
STRAIGHT = "motion, two straight steps"
LONG = 16                        # windows of a long voice
WORK = 206.8e9                   # FLOP of a step: 2 passes of 4 x 80 tokens
FRAME_WORK = 1233.6e9            # of W and G for one frame


@dataclass
class Settings:
    steps: int = 10              # of Euler
    weights: str = ""            # folder of LivePortrait's weights
    audio_encoder: str = ""      # file or folder of wav2vec 2.0 or HuBERT
    device: str = ""             # cuda if there is one
    compile: bool = False        # compile the renderer (minutes)


# ------------------------------------------------------------------------------- what a machine can
def timed(work):
    """Seconds that a call takes, and what it returns."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def sustained(flop, work, seconds):
    """FLOP/s of a call that is repeated for so long."""
    began, spent, count = time.perf_counter(), 0.0, 0
    while spent < seconds:
        timed(work)
        count += 1
        spent = time.perf_counter() - began
    return count * flop / spent


def peak(device, dtype, convolutions=False, seconds=2):
    """FLOP/s of large matrix products, or of convolutions like the renderer's if faster."""
    n, batch = (8192, 8) if device.type == "cuda" else (2048, 1)
    a = torch.randn(n, n, device=device).to(dtype)
    products = sustained(2 * n ** 3, lambda: a @ a, seconds)
    if not convolutions:
        return products
    x = torch.randn(batch, 512, 64, 64, device=device).to(dtype)
    weight = torch.randn(512, 512, 3, 3, device=device).to(dtype)
    flop = 2 * batch * 64 ** 2 * weight.numel()
    return max(products, sustained(flop, lambda: F.conv2d(x, weight, padding=1), seconds))


def knows_bfloat16(device):
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ------------------------------------------------------------------------------------- the networks
def full_model(device):
    """The released model's size; small random weights, so that every gate is open."""
    with torch.device("meta"):
        model = MoDA(Config(rope_streams=2, chunk=N))
    model.to_empty(device=device).requires_grad_(False).eval()
    for p in model.parameters():
        p.normal_(std=0.02)
    model.mean.zero_()
    model.std.fill_(1)
    return model


def in_bfloat16(model, device):
    half = full_model(device)
    for p, q in zip(half.parameters(), model.parameters()):
        p.data = q.data.bfloat16()
    return half


def window(device):
    """Audio, identity and the frame before."""
    torch.manual_seed(0)
    given = torch.randn(N, 12, 768), torch.randn(63), torch.randn(M)
    return [x.to(device) for x in given]


@torch.inference_mode()
def plain_loop(model, given, noise, steps):
    """A window as the equations say it."""
    audio, identity, prev = [x[None] for x in given]

    def velocity(z, k, emotion, drop_audio):
        t, emotion, drop_audio = [torch.tensor([x], device=z.device)
                                  for x in (1 - k / steps, emotion, drop_audio)]
        return model(z[None], t, audio, emotion, identity, prev, drop_audio)[0]
    z = noise.to(audio.device)
    for k in range(steps):
        v = velocity(z, k, EMOTION, False)
        v_dropped = velocity(z, k, NO_EMOTION, True)
        z = z - ((1 + SCALE) * v - SCALE * v_dropped) / steps          # Eq. 8, then Eq. 2
    return z.cpu()


def our_loop(model, given, noise, steps):
    return generate(model, *given, EMOTION, steps, GUIDANCE, chunk=N, noise=noise[None])


def long_voice(model, given, steps):
    """LONG windows of one voice, for which a GPU records its kernels once."""
    audio, *others = given
    voice = audio.repeat(LONG, 1, 1)
    return generate(model, voice, *others, EMOTION, steps, GUIDANCE, chunk=N, overlap=0)


def straight(model, given, noise, steps):
    """What a reflowed model of this size takes, in two passes altogether."""
    return generate(model, *given, EMOTION, 2, {}, chunk=N, noise=noise[None])


# ----------------------------------------------------------------------------------------- the rows
def in_turns(runs, turns):
    """{name: (call, what measures its peak)} one after the other, so many turns after a first one.

    Returns medians of seconds, medians of peaks, last results, each by name."""
    seconds, peaks, results = defaultdict(list), defaultdict(list), {}
    for _ in range(turns + 1):
        for name, (work, top) in runs.items():
            peaks[name].append(top())
            taken, results[name] = timed(work)
            seconds[name].append(taken)

    def medians(rows):
        return {name: statistics.median(row[1:]) for name, row in rows.items()}
    return medians(seconds), medians(peaks), results


def row(name, seconds, frames, work=0.0, top=0.0, remark=""):
    """Print it: per window, times real time, FLOP/s, share of the peak."""
    rates = " " * 29
    if work:
        rate = work / seconds
        rates = f"{rate / 1e9:>9.0f} GFLOP/s {rate / top:>6.2f} of peak"
    per_frame = seconds / frames
    print(f"{name:28}{1e3 * per_frame * N:>10.0f} ms {per_frame * 25:>9.4f} x {rates}  {remark}",
          flush=True)


def motion_rows(settings, device, turns):
    """Print the rows for motion -> seconds of the fastest window."""
    steps, model, given = settings.steps, full_model(device), window(device)
    noise = torch.randn(N, M)
    top = partial(peak, device, torch.float32)
    top_half = partial(peak, device, torch.bfloat16)
    runs = {"motion, plain loop": (partial(plain_loop, model, given, noise, steps), top),
            "motion": (partial(our_loop, model, given, noise, steps), top),
            STRAIGHT: (partial(straight, model, given, noise, steps), top)}
    if knows_bfloat16(device):
        half = in_bfloat16(model, device)
        runs["motion, bfloat16"] = partial(our_loop, half, given, noise, steps), top_half
    seconds, peaks, results = in_turns(runs, turns)
    plain = "motion, plain loop"
    for name, motion in results.items():
        ratio = seconds[plain] / seconds[name]
        error = (motion - results[plain]).abs().max()
        remark, work = f"{ratio:.2f} x the plain loop, deviates by {error:.0e}", steps * WORK
        if name == STRAIGHT:                       # with weights that are not straight
            remark, work = f"{ratio:.2f} x the plain loop", WORK
        row(name, seconds[name], N, work, peaks[name], remark)
    fastest = min(taken for name, taken in seconds.items() if name != STRAIGHT)
    if device.type != "cuda":                      # on a CPU it takes as many times as long
        return fastest
    taken = statistics.median(timed(partial(long_voice, half, given, steps))[0] for _ in range(5))
    row(f"motion, bfloat16, {LONG} windows", taken, LONG * N, LONG * steps * WORK,
        peaks["motion, bfloat16"])
    return taken / LONG


def audio_row(encoder, turns):
    """Print the row for the audio encoder -> its seconds."""
    wav = np.random.default_rng(0).standard_normal(N * RATE // 25).astype(np.float32)
    seconds = statistics.median(timed(lambda: list(encoder.blocks([wav])))[0] for _ in range(turns + 1))
    row("audio encoder", seconds, N)
    return seconds


def renderer_rows(faces, device, turns, compile):
    """Print a row for each face -> seconds per frame of the fastest."""
    source = faces["renderer"].source(np.full((512, 512, 3), 128, np.uint8))
    n = 80 if device.type == "cuda" else 2
    motion = source.motion + 0.001 * torch.randn(n, M)
    fastest = float("inf")
    for name, face in faces.items():
        if compile:
            face.render = torch.compile(face.render, dynamic=False)
        seconds = min(timed(lambda: list(face.frames(source, motion)))[0] for _ in range(turns))
        dtype = next(face.G.parameters()).dtype
        top = peak(device, dtype, convolutions=True)
        row(name, seconds, n, n * FRAME_WORK, top, f"{n / seconds:.3f} frames/s")
        fastest = min(fastest, seconds / n)
    return fastest


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    device = find_device(settings.device)
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    reached = peak(device, torch.float32) / 1e9
    print(f"{machine}, torch {torch.__version__}; per window of {N} frames, and in real time; "
          f"matrix products reach {reached:.0f} GFLOP/s in float32", flush=True)
    if not knows_bfloat16(device):
        print("this processor has no bfloat16 arithmetic: its rows are left out")
    if cuda:
        torch.cuda.set_device(device)              # what is timed waits for this one
    turns = 10 if cuda else 3
    motion = motion_rows(settings, device, turns)
    with tempfile.TemporaryDirectory() as folder:
        encoder = settings.audio_encoder or build.encoder(folder)
        encoder = AudioEncoder.from_pretrained(encoder).to(device)
        weights = settings.weights or build.liveportrait(folder)
        faces = {"renderer": LivePortrait(weights, device)}
        if knows_bfloat16(device):
            faces["renderer, bfloat16"] = LivePortrait(weights, device, torch.bfloat16)
    audio = audio_row(encoder, turns)
    frame = renderer_rows(faces, device, turns, settings.compile)
    row("end to end, stages added", audio + motion + frame * N, N)


if __name__ == "__main__":
    run(main)
