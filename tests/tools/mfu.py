"""Model FLOPs utilisation (MFU) of training: how much of a device's peak the network's products use.

    python tests/tools/mfu.py                    preset moda on a GPU: float32, bfloat16, compiled
    python tests/tools/mfu.py --preset=toy --batch_size=4 --steps=5          a try on a CPU

Steps as train.py's, of random windows that lie on the device already: forward, backward, clipping,
Adam. Work is what a forward pass multiplies, attention included, counted by PyTorch, times three
for backward; recomputed activations do not count. The peak is the maker's for dense bfloat16 where
the device is known, for float32 that of TF32; else what large matrix products reach here, in the
same precision, and at least what the steps themselves reach: a share is never above 1. Flags:
"""
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import train
from bench import knows_bfloat16, peak, timed
from data import find_device, parse_flags, run
from moda import PRESETS, Config, M, MoDA, draw, losses

N = 80                           # frames of a window
# TFLOP/s of dense bfloat16 in the makers' data sheets; TF32 has half of it
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "H20": 148, "A100": 312,
         "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71}


@dataclass
class Settings:
    preset: str = "moda"         # moda or toy
    batch_size: int = 32         # windows per step
    steps: int = 20              # that are timed, after three others
    checkpointing: bool = False  # recompute activations
    device: str = ""             # cuda if there is one


def windows(cfg, B, device):
    """What train.py gives a step: random windows, and what is drawn for them."""
    torch.manual_seed(0)
    batch = dict(draw(cfg, B, N, torch.Generator().manual_seed(0)),
                 motion=torch.randn(B, N, M),
                 prev=torch.randn(B, M),
                 audio=torch.randn(B, N, cfg.audio_layers, cfg.audio_dim).half(),
                 emotion=torch.arange(B) % 8,
                 identity=torch.randn(B, 63))
    return {name: x.to(device) for name, x in batch.items()}


def work_of(cfg):
    """FLOP that training does for a window: three times a forward pass."""
    with torch.device("meta"):
        model = MoDA(cfg)
    batch = windows(cfg, 1, "meta")
    batch["z0"] = batch.pop("motion")
    # written out as products, for the counter does not know every fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        losses(model, **batch)
    return 3 * counter.get_total_flops()


def step(net, model, optimizer, batch, bf16):
    with torch.autocast(model.mean.device.type, torch.bfloat16, enabled=bf16):
        *terms, _ = train.loss_terms(net, model, batch, None, 0.4, None)
    sum(terms).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def peak_of(device, bf16):
    """FLOP/s, and where that is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, teraflops in PEAKS.items():
            if known in name:
                return teraflops * 1e12 / (1 if bf16 else 2), f"data sheet, {known}"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return max(peak(device, dtype) for _ in range(3)), "measured by matrix products"


def show(settings, cfg, device, work, bf16, compile):
    """A row of the table."""
    options = train.Settings(checkpointing=settings.checkpointing, compile=compile)
    model = MoDA(cfg).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    net = train.wrapped(model, options)
    batch = windows(cfg, settings.batch_size, device)
    one = partial(step, net, model, optimizer, batch, bf16)
    for _ in range(3):
        one()
    seconds = statistics.median(timed(one)[0] for _ in range(settings.steps))
    rate = settings.batch_size * work / seconds
    top, source = peak_of(device, bf16)
    memory = ""
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB"
        torch.cuda.reset_peak_memory_stats(device)
    name = f"{'bfloat16' if bf16 else 'float32'}{', compiled' if compile else ''}"
    print(f"{name:20} {1e3 * seconds:9.1f} ms a step {settings.batch_size / seconds:9.1f} windows/s "
          f"{rate / 1e12:8.3f} TFLOP/s {rate / max(top, rate):6.1%} of {top / 1e12:.3f} ({source})"
          f"{memory}", flush=True)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    device = find_device(settings.device)
    cfg = Config(**PRESETS[settings.preset])
    work = work_of(cfg)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
        train.set_up(device)
    print(f"{machine}, torch {torch.__version__}; preset {settings.preset}, {settings.batch_size} "
          f"windows a step, {work / 1e9:.1f} GFLOP for each", flush=True)
    show(settings, cfg, device, work, bf16=False, compile=False)
    if knows_bfloat16(device):
        show(settings, cfg, device, work, bf16=True, compile=False)
    if device.type == "cuda":
        show(settings, cfg, device, work, bf16=True, compile=True)


if __name__ == "__main__":
    run(main)
