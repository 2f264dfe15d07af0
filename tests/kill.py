"""Nothing is lost to a kill: small trainings and preparations are killed with SIGKILL at random moments and started
again, until each has ended, over and over.

    python tests/kill.py --kills=200

After every kill each file under a final name must load: checkpoints, clips and manifest. A run that ended must hold the
same weights, clips and statistics as one that was never killed. Exit code 1 if any differs.
"""
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from data import parse_flags, run
from moda import MoDA, read_tensors
from test_prepare import STAND_IN, film, made_up

LONGEST = 3                                        # seconds until a kill


def child(main, argv):
    """Start main(argv) in a copy of this process, which has imported everything: a start costs no time."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        torch.set_num_threads(1)
        code = 1
        try:
            main(argv)
            code = 0
        finally:
            os._exit(code)
    return pid


def killed(pid, seconds):
    """Let a child run so long, then kill it -> False if it ended before. ValueError if it failed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and status:
            raise ValueError(f"a run failed by itself with {status}")
        if ended:
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def tensors(folder):
    """Every file under a final name that a run wrote, read: a damaged one is a ValueError."""
    read = {".pt": read_tensors, ".safetensors": data.read_safetensors, ".json": lambda path: json.loads(path.read_text())}
    return {str(path.relative_to(folder)): read[path.suffix](path)
            for path in sorted(folder.rglob("*")) if path.suffix in read}


def same(a, b):
    (a, kind_a), (b, kind_b) = map(torch.utils._pytree.tree_flatten, (a, b))
    return kind_a == kind_b and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


def trial(name, main, argv, out, whole, chance, kills):
    """Start a run until one ends, killing the others -> how many were killed."""
    for count in range(kills + 1):
        resume = ["--init_from=resume"] * (name == "training" and (out / "ckpt.pt").exists())
        seconds = LONGEST * chance.random() ** 2 if count < kills else 1000
        if not killed(child(main, [*argv(out), *resume]), seconds):
            if not same(tensors(out), whole):
                raise ValueError(f"{out}: the {name} ended otherwise than one that was never killed")
            return count
        for file in tensors(out):
            if name == "training":
                MoDA.from_pretrained(out / file)


def main(argv):
    flags = parse_flags("    --kills=200\n    --seed=1", argv)
    torch.set_num_threads(1)
    exec(STAND_IN, names := {})
    data.LivePortrait, data.motion_heads = names["Face"], names["heads"]
    left, chance, told = flags["kills"], random.Random(flags["seed"]), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "videos").mkdir()
        for k in range(3):
            film(folder / f"videos/{k}.mp4", k)
        made_up(folder / "set")
        runs = {
            "training": (train.main, lambda out: [
                f"--data_dir={folder}/set", f"--out_dir={out}", "--width=32", "--heads=1", "--batch_size=2",
                "--steps=40", "--warmup=5", "--save_every=2", "--eval_clips=0", "--device=cpu"]),
            "preparation": (data.main, lambda out: [
                f"--videos={folder}/videos", f"--data_dir={out}", "--weights=unused"])}
        whole = {}
        for name, (start, argv) in runs.items():
            began = time.monotonic()
            if killed(child(start, argv(folder / f"whole {name}")), 1000):
                raise ValueError(f"the {name} takes too long")
            whole[name] = tensors(folder / f"whole {name}")
            print(f"one {name}, never killed: {time.monotonic() - began:.1f} s, {len(whole[name])} files", flush=True)
            told[name] = [0, 0]
        for name in itertools.cycle(runs):
            if not left:
                break
            out = folder / f"{name} {told[name][1]}"
            count = trial(name, *runs[name], out, whole[name], chance, min(left, 8))
            left, told[name] = left - count, [told[name][0] + count, told[name][1] + 1]
            print(f"{name}: {count} kills, then the same as never killed; {left} kills left", flush=True)
    for name, (kills, ended) in told.items():
        print(f"{name}: {kills} kills in {ended} runs; no damaged file, and each ended as if never killed")


if __name__ == "__main__":
    run(main)
