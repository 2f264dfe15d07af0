"""Frames per second of W + G, the share of the machine's peak, and the ratio to a plain loop that caches nothing.

    python tests/bench_renderer.py [--weights=pretrained_weights] [--frames=8]

Without weights it fills its own. The plain loop is a process of its own, as plain PyTorch would run it; it and ours take
turns, frame by frame, so that a drifting machine harms neither.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import build
import renderer
from renderer import LivePortrait, Weights


class Plain(Weights):
    """The layers as the specification words them: nothing folded, upsampling done pixel by pixel."""

    def conv(self, x, name, n_out, k=3, norm="", up=1, stride=1, groups=1, bias=True):
        def make():
            orig = f"{name}.weight_orig"
            keys = [orig, f"{name}.weight_u", f"{name}.weight_v"] if orig in self.tensors else [f"{name}.weight"]
            keys += [f"{name}.bias"] * bias + [f"{norm}.{key}" for key in ("running_mean", "running_var", "weight", "bias") if norm]
            return [self.take(key, *self.tensors[key].shape) for key in keys]
        tensors = list(self.once(name, x, make))
        weight = tensors.pop(0)
        if len(tensors) > 1 and tensors[1].shape == weight[0].flatten().shape:      # spectral norm, every time
            u, v = tensors.pop(0), tensors.pop(0)
            weight = weight / (u @ weight.flatten(1) @ v)
        b = tensors.pop(0) if bias else None
        if up > 1:
            x = F.interpolate(x, scale_factor=(up, up) if x.ndim == 4 else (1, up, up))
        x = (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, b, stride, k // 2 if stride == 1 else 0, 1, groups)
        return F.batch_norm(x, *tensors, eps=1e-5) if norm else x


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
    renderer.Weights, renderer.spade_block, renderer.keep_big_blocks = Plain, plain_spade_block, lambda: None


def render(face, f, x_s, x_d):
    with torch.inference_mode():
        n = len(x_d)
        h = renderer.warp(face.W, f.expand(n, -1, -1, -1, -1), x_s.expand(n, -1, -1), x_d)
        return renderer.generate(face.G, h)


def seconds(run):
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(device, dtype, n=2048):
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(seconds(lambda: a @ a) for _ in range(10))


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
    runs = {"plain": plain} | {name: lambda face=face: seconds(lambda: render(face, f, x_s, x_d[:1])) for name, face in faces.items()}
    times = {name: [] for name in runs}
    for _ in range(n + 1):
        for name, run in runs.items():
            times[name].append(run())
    child.stdin.close()
    median = {name: np.median(t[1:]) for name, t in times.items()}
    reference = torch.load(out, weights_only=True)
    for name, face in faces.items():
        error = render(face, f, x_s, x_d[:1]).float() - reference
        print(f"{name}: {median['plain'] / median[name]:.2f}x the plain float32 loop ({median['plain']:.2f} s a frame); the image "
              f"deviates by {error.abs().max() / reference.std():.1e} of its std at most, "
              f"{error.square().mean().sqrt() / reference.std():.1e} rms")


def main():
    flags = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
    weights = flags.get("weights") or build.liveportrait(tempfile.mkdtemp())
    if "plain" in flags:
        return plain_loop(weights, flags["plain"])
    cuda, low = torch.cuda.is_available(), torch.bfloat16
    device = "cuda" if cuda else "cpu"
    print(torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads", f"torch {torch.__version__}")
    scenery = scene(weights, device)
    faces = {"float32": LivePortrait(weights, device), "bfloat16": LivePortrait(weights, device, low)}
    if not cuda:
        compare(weights, faces, *scenery, int(flags.get("frames", 5)))
    else:
        faces["bfloat16 compiled"] = LivePortrait(weights, device, low, compile=True)
    f, x_s, x_d = scenery
    work = 1233.6e9                                                          # per frame, counted on the plain layers
    for name, face in faces.items():
        top = peak(device, torch.float32 if name == "float32" else low, 8192 if cuda else 2048)
        for batch in (1, 2, 4, 8):
            run = lambda: face.render(f.expand(batch, -1, -1, -1, -1), x_s.expand(batch, -1, -1), x_d[:batch])
            with torch.inference_mode():
                began = seconds(run)
                t = min(seconds(run) for _ in range(10 if cuda else 2)) / batch
            print(f"{name} batch {batch}: {1 / t:8.3f} frames/s, {work / t / 1e9:7.0f} GFLOP/s of the plain layers' work, "
                  f"{work / t / top:.2f} of the matmul peak {top / 1e9:.0f} GFLOP/s; first call {began:.2f} s")


if __name__ == "__main__":
    main()
