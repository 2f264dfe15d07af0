"""Nothing is lost to a kill: small trainings and preparations are killed with SIGKILL at random
moments and started again, until each has ended, over and over.

    python tests/tools/kill.py --kills=200
    python tests/tools/kill.py --kills=0 --restarts=3

The second: one of two processes of a training is killed, and torchrun starts both again. After every kill each file under a final name must load: checkpoints, clips and manifest. A run that
ended must hold the same weights, clips and statistics as one that was never killed. If any differs,
the exit code is 1. Flags:
"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import build
import data
import train
from data import parse_flags, run
from moda import MoDA, read_checkpoint
from stand_in import LivePortrait

LONGEST = 3                      # seconds until a kill
MOST = 8                         # kills of one run, before it may end


@dataclass
class Settings:
    kills: int = 200             # of both kinds of runs together
    restarts: int = 1            # trainings of which torchrun starts both processes again
    seed: int = 1                # of the moments


# --------------------------------------------------------------------------------- starts and kills
def start(main, argv):
    """Run main(argv) in a copy of this process, which has imported everything -> its id."""
    pid = os.fork()
    if pid:
        return pid
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        main(argv)
        code = 0
    finally:
        os._exit(code)


def killed(pid, seconds):
    """Let a process run so long, then kill it -> was it killed? ValueError if it failed before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and status:
            raise ValueError(f"a run failed by itself with {status}")
        if ended:
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


# --------------------------------------------------------------------------- what a run has written
def read_npy(path):
    return torch.from_numpy(np.load(path))


def read_json(path):
    return json.loads(path.read_text())


def read_run(path):
    return read_checkpoint(path) | dict(settings=None)                 # which name the folder


READ = {".pt": read_run, ".npy": read_npy, ".json": read_json}


def files(folder):
    """Every file under a final name that a run wrote, read: a damaged one is an error."""
    found = {}
    for path in sorted(folder.rglob("*")):
        final = not path.name.startswith(".part-")             # where data.appearing writes first
        if path.suffix in READ and final:
            found[str(path.relative_to(folder))] = READ[path.suffix](path)
    return found


def same(a, b):
    """Are two nests of dicts and lists equal, to the bit?"""
    a, kind_a = tree_flatten(a)
    b, kind_b = tree_flatten(b)
    if kind_a != kind_b:
        return False
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


# ------------------------------------------------------------------------------------- the two runs
class Training:
    name = "training"
    main = staticmethod(train.main)

    def __init__(self, folder):
        self.data_dir = build.data_set(folder / "set")

    def argv(self, out):
        flags = ("--width=32 --heads=1 --batch_size=2 --steps=40 --warmup=5 --save_every=2 "
                 "--eval_every=4 --device=cpu --init_from=auto").split()
        return [f"--data_dir={self.data_dir}", f"--out_dir={out}", *flags]

    def check(self, out):
        for name in files(out):
            MoDA.from_pretrained(out / name)


class Preparation:
    name = "preparation"
    main = staticmethod(data.main)

    def __init__(self, folder):
        self.videos = folder / "videos"
        self.videos.mkdir()
        for k in range(3):
            build.video(self.videos / f"{k}.mp4", k)

    def argv(self, out):
        return [f"--videos={self.videos}", f"--data_dir={out}", "--weights=unused"]

    def check(self, out):
        files(out)


def never_killed(job, out):
    """The files of a run that nobody disturbs."""
    began = time.monotonic()
    if killed(start(job.main, job.argv(out)), seconds=1000):
        raise ValueError(f"the {job.name} takes too long")
    whole = files(out)
    seconds = time.monotonic() - began
    print(f"one {job.name}, never killed: {seconds:.1f} s, {len(whole)} files", flush=True)
    return whole


def trial(job, out, whole, rng, kills):
    """Start a run until it ends, and kill it before, `kills` times at most -> how many times."""
    for count in range(kills + 1):
        seconds = LONGEST * rng.random() ** 2
        if count == kills:
            seconds = 1000
        if not killed(start(job.main, job.argv(out)), seconds):
            break
        job.check(out)
    if not same(files(out), whole):
        raise ValueError(f"{out}: the {job.name} ended otherwise than one that was never killed")
    return count


# ----------------------------------------------------------------------------- torchrun's restarts
def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def restarted(job, out, rng, kill):
    """Train with two processes; one is killed after a random step, if asked -> files, seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max_restarts=3", TESTS.parent / "train.py", *job.argv(out)]
    began = time.monotonic()
    log, step = out / "log.csv", rng.randrange(2, 30)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        while kill and not (log.exists() and f"\n{step}," in log.read_text()):
            if process.poll() is not None:
                raise ValueError("torchrun ended before the kill")
            time.sleep(0.001)
        if kill:
            os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
    if process.returncode:
        raise ValueError(f"torchrun ended with {process.returncode}")
    return files(out), time.monotonic() - began


def restarts(job, folder, rng, count):
    """So many trainings by torchrun, each beside one that nobody disturbs."""
    whole, seconds = restarted(job, folder / "whole torchrun", rng, kill=False)
    print(f"two processes by torchrun, never killed: {seconds:.1f} s", flush=True)
    for k in range(count):
        found, seconds = restarted(job, folder / f"torchrun {k}", rng, kill=True)
        if not same(found, whole):
            raise ValueError("the restarted training ended otherwise than one never killed")
        print(f"one of two processes killed, both restarted: {seconds:.1f} s, then the same as "
              "never killed", flush=True)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    torch.set_num_threads(1)
    LivePortrait.seconds = 0.02
    data.LivePortrait = LivePortrait
    rng, left = random.Random(settings.seed), settings.kills
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        jobs = [Training(folder), Preparation(folder)]
        if settings.restarts:
            restarts(jobs[0], folder, rng, settings.restarts)
        if not settings.kills:
            return
        whole = {job.name: never_killed(job, folder / f"whole {job.name}") for job in jobs}
        kills = {job.name: [] for job in jobs}     # of each run
        for job in itertools.cycle(jobs):
            if not left:
                break
            out = folder / f"{job.name} {len(kills[job.name])}"
            count = trial(job, out, whole[job.name], rng, min(left, MOST))
            kills[job.name].append(count)
            left -= count
            print(f"{job.name}: {count} kills, then the same as never killed; {left} kills left",
                  flush=True)
    for name, counts in kills.items():
        print(f"{name}: {sum(counts)} kills in {len(counts)} runs; no damaged file, and each ended "
              "as if never killed")


if __name__ == "__main__":
    run(main)
