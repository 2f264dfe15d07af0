"""Frames per second of W + G, the share of the machine's peak, and the ratio to a plain loop.

    python tests/tools/bench_renderer.py [--weights=pretrained_weights] [--frames=5]
        [--batches=1,2,4,8]
    python tests/tools/bench_renderer.py --memory=30 --dtype=bfloat16
                                         peak memory on a CPU after so many frames

Without weights it fills its own. The plain loop is the networks as they were trained, nothing
folded, in a process of its own, memory as PyTorch has it; it and ours take turns, frame by frame,
so that a drifting machine harms neither."""
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
import build
from bench import FRAME_WORK, knows_bfloat16, peak, timed
from renderer import AppearanceExtractor, LivePortrait, SpadeGenerator, WarpingNetwork, load


def load_plain(network, weights, file):
    """A network with nothing folded, from the folder of the weights."""
    root = Path(weights)
    if (root / "liveportrait").is_dir():
        root = root / "liveportrait"
    return load(network, root / "base_models" / file)


@torch.inference_mode()
def scene(weights, device):
    """Appearance, source keypoints and those of eight frames."""
    torch.manual_seed(0)
    extractor = load_plain(AppearanceExtractor, weights, "appearance_feature_extractor.pth")
    f_s = extractor(torch.rand(1, 3, 256, 256)).to(device)
    x_s = 0.3 * torch.randn(1, 21, 3, device=device)
    return f_s, x_s, x_s + 0.02 * torch.randn(8, 21, 3, device=device)


@torch.inference_mode()
def first_image(W, G, f_s, x_s, x_d):
    return G(W(f_s, x_s, x_d[:1]))


# ------------------------------------------------------------------------------ beside a plain loop
def plain_loop(weights, out):
    """Renders a frame for every line it reads, and answers with the seconds."""
    W = load_plain(WarpingNetwork, weights, "warping_module.pth")
    G = load_plain(SpadeGenerator, weights, "spade_generator.pth")
    given = scene(weights, "cpu")
    torch.save(first_image(W, G, *given), out)
    for _ in sys.stdin:
        seconds, _ = timed(lambda: first_image(W, G, *given))
        print(seconds, flush=True)


def compare(weights, faces, given, n):
    """Every face and the plain loop in turns, n frames each after a first one."""
    out = Path(tempfile.mkdtemp()) / "plain.pt"
    command = [sys.executable, __file__, f"--weights={weights}", f"--plain={out}"]
    child = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    plain = []
    times = {name: [] for name in faces}
    for _ in range(n + 1):
        child.stdin.write("\n")
        child.stdin.flush()
        plain.append(float(child.stdout.readline()))
        for name, face in faces.items():
            seconds, _ = timed(lambda: first_image(face.W, face.G, *given))
            times[name].append(seconds)
    child.stdin.close()
    reference = torch.load(out, weights_only=True)
    slow = np.median(plain[1:])
    for name, face in faces.items():
        fast = np.median(times[name][1:])
        error = (first_image(face.W, face.G, *given).float() - reference) / reference.std()
        print(f"{name}: {slow / fast:.2f}x the plain float32 loop, {fast:.2f} s a frame against "
              f"{slow:.2f}; the image deviates by {error.abs().max():.1e} of its std at most, "
              f"{error.square().mean().sqrt():.1e} rms", flush=True)


# ---------------------------------------------------------------------------------- memory, batches
def memory(weights, n, dtype):
    face = LivePortrait(weights, dtype=getattr(torch, dtype))
    source = face.source(np.zeros((512, 512, 3), np.uint8))
    frames = face.frames(source, source.motion.repeat(n, 1))
    for count, _ in enumerate(frames, 1):
        if count in (1, 3, 10, 30, 100, 300, n):
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"{dtype}: {peak_kib / 2**20:.2f} GiB at most in {count} frames", flush=True)


@torch.inference_mode()
def throughput(name, face, given, batch, top):
    f_s, x_s, x_d = given
    f_s = f_s.expand(batch, -1, -1, -1, -1)
    x_s = x_s.expand(batch, -1, -1)
    seconds = []
    for _ in range(11 if face.device.type == "cuda" else 2):
        seconds.append(timed(lambda: face.render(f_s, x_s, x_d[:batch]))[0])
    t = min(seconds) / batch
    rate = FRAME_WORK / t
    print(f"{name} batch {batch}: {1 / t:8.3f} frames/s, {rate / 1e9:7.0f} GFLOP/s of the plain "
          f"layers' work, {rate / top:.2f} of the peak {top / 1e9:.0f} GFLOP/s; first call "
          f"{seconds[0]:.2f} s", flush=True)


def main():
    flags = dict(arg.removeprefix("--").split("=") for arg in sys.argv[1:])
    weights = flags.get("weights") or build.liveportrait(tempfile.mkdtemp())
    if "plain" in flags:
        return plain_loop(weights, flags["plain"])
    if "memory" in flags:
        return memory(weights, int(flags["memory"]), flags.get("dtype", "float32"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}", flush=True)
    faces = {"float32": LivePortrait(weights, device)}
    if knows_bfloat16(device):
        faces["bfloat16"] = LivePortrait(weights, device, torch.bfloat16)
    else:
        print("this processor has no bfloat16 arithmetic: left out")
    given = scene(weights, device)
    if cuda:
        compiled = LivePortrait(weights, device, torch.bfloat16)
        compiled.render = torch.compile(compiled.render)
        faces["bfloat16 compiled"] = compiled
    else:
        compare(weights, faces, given, int(flags.get("frames", 5)))
    batches = flags.get("batches", "1,2,4,8").split(",")
    for name, face in faces.items():
        dtype = next(face.G.parameters()).dtype
        top = peak(device, dtype, convolutions=True)
        for batch in batches:
            throughput(name, face, given, int(batch), top)


if __name__ == "__main__":
    main()
