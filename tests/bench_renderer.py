"""Frames per second of W + G, the share of the machine's peak, and the ratio to a plain loop that caches nothing.

    python tests/bench_renderer.py [--weights=pretrained_weights] [--frames=5] [--batches=1,2,4,8]
    python tests/bench_renderer.py --memory=30 --dtype=bfloat16        peak memory on a CPU after so many frames

Without weights it fills its own. The plain loop is a process of its own, as plain PyTorch would run it, memory included;
it and ours take turns, frame by frame, so that a drifting machine harms neither.
"""
import ctypes
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import build

if any(arg.startswith("--plain") for arg in sys.argv):
    ctypes.CDLL = lambda name: None                                          # no mallopt for the plain loop
import renderer
from bench import FRAME_WORK, knows_bfloat16, peak, timed
from renderer import BATCH_NORM, LivePortrait, Weights


class Plain(Weights):
    """The layers as the reference has them: nothing folded, upsampling done pixel by pixel."""

    def conv(self, x, name, n, k=3, norm="", up=1, stride=0, groups=1, bias=True):
        orig = f"{name}.weight_orig"

        def make():
            keys = [orig, f"{name}.weight_u", f"{name}.weight_v"] if orig in self.tensors else [f"{name}.weight"]
            keys += [f"{name}.bias"] * bias + [f"{norm}.{key}" for key in BATCH_NORM if norm]
            return [self.take(key, *self.tensors[key].shape) for key in keys]
        weight, *rest = self.once(name, x, make)
        if len(rest) > 1 and not norm:
            u, v, *rest = rest                                             # spectral norm, every time
            weight = weight / (u @ weight.flatten(1) @ v)
        b = rest.pop(0) if bias else None
        if up > 1:
            x = F.interpolate(x, scale_factor=(1, up, up)[-x.ndim + 2:])
        padding = 0 if stride else k // 2
        x = (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, b, stride or 1, padding, 1, groups)
        return F.batch_norm(x, *rest, eps=1e-5) if norm else x


def plain_spade(net, name, x, h):
    a = F.relu(net.conv(F.interpolate(h, x.shape[2:]), f"{name}.mlp_shared.0", 128))
    gamma, beta = (net.conv(a, f"{name}.mlp_{which}", x.size(1)) for which in ("gamma", "beta"))
    return F.instance_norm(x) * (1 + gamma) + beta


def plain_spade_block(net, name, x, h, n):
    dx = net.conv(F.leaky_relu(plain_spade(net, f"{name}.norm_0", x, h), 0.2), f"{name}.conv_0", min(x.size(1), n))
    dx = net.conv(F.leaky_relu(plain_spade(net, f"{name}.norm_1", dx, h), 0.2), f"{name}.conv_1", n)
    if x.size(1) != n:
        x = net.conv(plain_spade(net, f"{name}.norm_s", x, h), f"{name}.conv_s", n, k=1, bias=False)
    return x + dx


def use_plain_layers():
    renderer.Weights, renderer.spade_block = Plain, plain_spade_block


def render(face, f, x_s, x_d):
    with torch.inference_mode():
        n = len(x_d)
        h = renderer.warp(face.W, f.expand(n, -1, -1, -1, -1), x_s.expand(n, -1, -1), x_d)
        return renderer.generate(face.G, h)


def seconds(run):
    return timed(run)[0]


def scene(weights, device):
    torch.manual_seed(0)
    f = renderer.appearance(LivePortrait(weights).F, torch.rand(1, 3, 256, 256)).to(device)
    x_s = 0.3 * torch.randn(1, 21, 3, device=device)
    return f, x_s, x_s + 0.02 * torch.randn(8, 21, 3, device=device)


def plain_loop(weights, out):
    """Renders a frame for every line it reads, and answers with the seconds."""
    use_plain_layers()
    f, x_s, x_d = scene(weights, "cpu")
    face = LivePortrait(weights)
    torch.save(render(face, f, x_s, x_d[:1]), out)
    for _ in sys.stdin:
        print(seconds(lambda: render(face, f, x_s, x_d[:1])), flush=True)


def compare(weights, faces, f, x_s, x_d, n):
    out = Path(tempfile.mkdtemp()) / "plain.pt"
    child = subprocess.Popen([sys.executable, __file__, f"--weights={weights}", f"--plain={out}"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def plain():
        child.stdin.write("\n")
        child.stdin.flush()
        return float(child.stdout.readline())
    runs = {"plain": plain}
    for name, face in faces.items():
        runs[name] = lambda face=face: seconds(lambda: render(face, f, x_s, x_d[:1]))
    times = {name: [] for name in runs}
    for _ in range(n + 1):
        for name, run in runs.items():
            times[name].append(run())
    child.stdin.close()
    median = {name: np.median(t[1:]) for name, t in times.items()}
    reference = torch.load(out, weights_only=True)
    for name, face in faces.items():
        error = render(face, f, x_s, x_d[:1]).float() - reference
        most, rms = error.abs().max() / reference.std(), error.square().mean().sqrt() / reference.std()
        print(f"{name}: {median['plain'] / median[name]:.2f}x the plain float32 loop, {median[name]:.2f} s a frame "
              f"against {median['plain']:.2f}; the image deviates by {most:.1e} of its std at most, {rms:.1e} rms",
              flush=True)


def memory(weights, n, dtype):
    face = LivePortrait(weights, dtype=getattr(torch, dtype))
    source = face.source(np.zeros((512, 512, 3), np.uint8))
    for count, _ in enumerate(face.frames(source, source.motion.repeat(n, 1)), 1):
        if count in (1, 3, 10, 30, 100, 300, n):
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"{dtype}: {peak_kib / 2**20:.2f} GiB at most in {count} frames", flush=True)


def main():
    flags = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
    weights = flags.get("weights") or build.liveportrait(tempfile.mkdtemp())
    if "plain" in flags:
        return plain_loop(weights, flags["plain"])
    if "memory" in flags:
        return memory(weights, int(flags["memory"]), flags.get("dtype", "float32"))
    cuda, low = torch.cuda.is_available(), torch.bfloat16
    device = "cuda" if cuda else "cpu"
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}", flush=True)
    scenery = scene(weights, device)
    faces = {"float32": LivePortrait(weights, device)}
    if knows_bfloat16(torch.device(device)):
        faces["bfloat16"] = LivePortrait(weights, device, low)
    else:
        print("this processor has no bfloat16 arithmetic: left out")
    if not cuda:
        compare(weights, faces, *scenery, int(flags.get("frames", 5)))
    else:
        faces["bfloat16 compiled"] = LivePortrait(weights, device, low)
        faces["bfloat16 compiled"].render = torch.compile(faces["bfloat16 compiled"].render)
    f, x_s, x_d = scenery
    for name, face in faces.items():
        top = peak(torch.device(device), face.G.dtype, convolutions=True)
        for batch in map(int, flags.get("batches", "1,2,4,8").split(",")):
            run = lambda: face.render(f.expand(batch, -1, -1, -1, -1), x_s.expand(batch, -1, -1), x_d[:batch])
            with torch.inference_mode():
                began = seconds(run)
                t = min([began] + [seconds(run) for _ in range(10 if cuda else 1)]) / batch
            rate = FRAME_WORK / t
            print(f"{name} batch {batch}: {1 / t:8.3f} frames/s, {rate / 1e9:7.0f} GFLOP/s of the plain layers' work, "
                  f"{rate / top:.2f} of the peak {top / 1e9:.0f} GFLOP/s; first call {began:.2f} s", flush=True)


if __name__ == "__main__":
    main()
