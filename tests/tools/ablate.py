"""The paper's claims at toy scale: every variant is trained with a few seeds, then measured on
clips it never saw.

    python tests/tools/ablate.py     half an hour on two cores; what is trained already is not again

Prints a table, mean ± standard deviation over seeds; where two spreads meet, the variants do not
separate. Flags:
"""
import contextlib
import csv
import functools
import json
import shutil
import statistics
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import sample
import train
from data import ToyTalker, parse_flags, run
from moda import (JointBlock, MoDA, SingleBlock, attention, init_weights, modulate, read_checkpoint,
                  timestep_embedding)


@dataclass
class Settings:
    steps: int = 500             # of each training
    clips: int = 100             # toy clips to learn from
    batch_size: int = 8          # windows per step
    seeds: int = 3               # trainings of each variant
    eval_clips: int = 6          # unseen clips per table, 12 at most: they cost as much as training
    out: str = "out/ablate"      # checkpoints, logs and rows.json


# ------------------------------------------------------------------------------ emotion as a stream
class StreamMoDA(MoDA):
    """AdaLN is conditioned on time alone."""

    def conditioning(self, t, emotion):
        return F.silu(self.time_embedder(timestep_embedding(t)))[:, None]


# ---------------------------------------------------------------------------------- cross-attention
class ConditionAttention(SingleBlock):
    """Motion attends to its conditions alone: (B, 4N, D), motion first -> (B, N, D)."""

    def forward(self, x, c, rope):
        N, D = len(rope), x.size(-1)
        shift, scale, gate = self.adaln(c).chunk(3, -1)
        u = modulate(x, shift, scale)
        weight, mlp_weight = self.qkv_mlp.weight.split([3 * D, 4 * D])
        bias, mlp_bias = self.qkv_mlp.bias.split([3 * D, 4 * D])
        q, k, v = self.heads(F.linear(u, weight, bias), rope)
        y = attention(q[:, :, :N], k[:, :, N:], v[:, :, N:])
        h = F.gelu(F.linear(u[:, :N], mlp_weight, mlp_bias), approximate="tanh")
        return x[:, :N] + gate * self.out(torch.cat([y, h], -1))


class CrossBlock(nn.Module):
    """Motion attends to itself, then to its conditions, which stay as they are."""

    def __init__(self, cfg):
        super().__init__()
        self.own = JointBlock(cfg, 1, 1)
        self.cross = ConditionAttention(cfg)

    def forward(self, xs, c, rope):
        m, cond = xs
        m, = self.own([m], c, rope)
        return self.cross(torch.cat([m, cond], 1), c, rope), cond


class CrossMoDA(MoDA):
    """Table 3's "w/ CABA": cross-attention blocks in place of all three stages."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, n_four=0, n_two=0, n_one=0))
        self.cfg = cfg
        depth = cfg.n_four + cfg.n_two + cfg.n_one
        self.two = nn.ModuleList(CrossBlock(cfg) for _ in range(depth))
        init_weights(self)


# --------------------------------------------------------------------------------------- the claims
# flags of training and of sampling, and the network
Variant = namedtuple("Variant", "training sampling network", defaults=("", "", MoDA))
BASE = Variant()
FOUR = Variant("--n_four=3 --n_two=0 --n_one=0")   # as deep as the toy
CROSS = Variant(network=CrossMoDA)
STREAM_ONLY = Variant(network=StreamMoDA)
GATED = Variant("--alse={out}/expert/ckpt.pt --tau=0.4")
UNGATED = Variant("--alse={out}/expert/ckpt.pt --tau=99")
CLAIMS = {
    "fusion": {"c2f": BASE, "four-stream only": FOUR, "cross-attention": CROSS},
    "Euler steps": {
        str(n): Variant(sampling=f"--steps={n}") for n in (1, 2, 5, 10, 20, 40)},
    "audio guidance": {
        str(x): Variant(sampling=f"--cfg_both=0 --cfg_audio={x}") for x in (0, 0.2, 0.5, 1, 2)},
    "emotion": {"in AdaLN and as a stream": BASE, "as a stream only": STREAM_ONLY},
    "sync loss": {"without ALSE": BASE, "tau 0.4": GATED, "no gate": UNGATED}}


# columns of the table, and where sample.py's has them
COLUMNS = {
    "mouth corr": ("model", "mouth corr"),
    "mouth error": ("model", "mouth error"),
    "Sync-C": ("model", "Sync-C"),
    "Sync-D": ("model", "Sync-D"),
    "jerk": ("model", "jerk, rotation"),
    "pose diversity": ("other seed", "heads apart"),
    "emotion": ("other voice", "emotion"),
    "corr, other voice": ("other voice", "mouth corr")}


@functools.cache
def talker(split, clips):
    return ToyTalker(split, clips)                 # clip k is always the same


def trained(settings, name, *flags):
    """Folder of a finished training; it is done unless there is one."""
    out = Path(settings.out) / name
    path = out / "ckpt.pt"
    if path.exists() and read_checkpoint(path)["step"] == settings.steps:
        return out
    usual = ["--eval_clips=0"]
    if "--model=alse" not in flags:                # an expert drops nothing
        usual.append("--p_drop_audio=0.2")
    for field in ("steps", "clips", "batch_size"):
        usual.append(f"--{field}={getattr(settings, field)}")
    shutil.rmtree(out, ignore_errors=True)         # of an earlier call
    train.main([f"--out_dir={out}", *usual, *flags])
    return out


@functools.cache
def measured(ckpt, alse, *flags):
    """The table of sample.py --eval, as {row: {column: number}}."""
    with contextlib.redirect_stdout(None):
        return sample.main([f"--ckpt={ckpt}", f"--alse={alse}", "--eval", *flags])


def row_of(settings, seed, variant):
    """All that is known of one variant under one seed."""
    train.MoDA = sample.MoDA = variant.network
    flags = variant.training.format(out=settings.out).split()
    words = [flag.strip("-").replace("/", "") for flag in flags]
    if variant.network is not MoDA:
        words.append(variant.network.__name__)
    name = "_".join([*words, f"seed{seed}"])
    out = trained(settings, name, *flags, f"--seed={seed}")
    expert = Path(settings.out) / "expert/ckpt.pt"
    table = measured(out / "ckpt.pt", expert, *variant.sampling.split())
    with open(out / "log.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    tensors = read_checkpoint(out / "ckpt.pt")["model"].values()
    row = {name: float(table[line][metric]) for name, (line, metric) in COLUMNS.items()}
    row["ms per step"] = 1e3 * statistics.median(seconds)
    row["M parameters"] = sum(x.numel() for x in tensors) / 1e6
    return row


# ---------------------------------------------------------------------------------------- the table
def cell(name, values):
    mean = statistics.mean(values)
    if name == "M parameters":
        return f"{mean:.2f}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.3f} ± {deviation:.3f}"


def show(results):
    """A table in Markdown, the one of tests/tools/README.md, which pictures.py reads."""
    first = next(iter(results["fusion"].values()))
    columns = list(first[0])
    print(f"| | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for claim, variants in results.items():
        for variant, rows in variants.items():
            cells = [cell(name, [row[name] for row in rows]) for name in columns]
            print(f"| {claim}: {variant} | {' | '.join(cells)} |")


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    train.ToyTalker = talker

    class Shared(ToyTalker):                       # made once for all variants
        def __init__(self, split, clips=60):
            number = settings.eval_clips if split == "val" else clips
            vars(self).update(vars(talker(split, number)))
    sample.ToyTalker = Shared
    trained(settings, "expert", "--model=alse")
    seeds = range(1, settings.seeds + 1)
    results = {}
    for claim, variants in CLAIMS.items():
        results[claim] = {}
        for name, variant in variants.items():
            results[claim][name] = [row_of(settings, seed, variant) for seed in seeds]
    (Path(settings.out) / "rows.json").write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__main__":
    run(main)
