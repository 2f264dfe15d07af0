"""The figures of the README's "First experiments": the motion of each of its commands for
sample.py, beside that of the same command without its last flag.

    python train.py && python train.py --reflow=out/toy/ckpt.pt && python tests/tools/experiments.py

Correlation of the mouth's opening and of the head's three angles; how many times as far the mouth
opens (standard deviation), as much the head shakes (third difference), as strong the expression is
(how far the face without its lips lies from rest, in the mean). Flags:
"""
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import sample
from data import parse_flags, run
from moda import LIPS, MOUTH, ROT

STILL = np.setdiff1d(range(63), LIPS)


@dataclass
class Settings:
    only: str = ""               # a word of the commands that are run; else all


def motion_of(flags):
    """What --save_motion keeps: (T, 70)."""
    with tempfile.TemporaryDirectory() as folder:
        sample.main([*flags, f"--output_path={folder}/v.mp4", f"--save_motion={folder}/m.npy"])
        return np.load(f"{folder}/m.npy")


def correlation(a, b):
    return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T)])


def jerk(head):
    return np.abs(np.diff(head, 3, axis=0)).mean()


def beside(a, b):
    return {
        "mouth corr": correlation(a[:, [MOUTH]], b[:, [MOUTH]]),
        "head corr": correlation(a[:, ROT], b[:, ROT]),
        "mouth opens": a[:, MOUTH].std() / b[:, MOUTH].std(),
        "head shakes": jerk(a[:, ROT]) / jerk(b[:, ROT]),
        "expression": np.linalg.norm(a[:, STILL].mean(0)) / np.linalg.norm(b[:, STILL].mean(0))}


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    section = (ROOT / "README.md").read_text().split("## First experiments")[1].split("\n## ")[0]
    for command in re.findall(r"`(python sample\.py --audio_path[^`]*)`", section):
        if settings.only in command:
            _, _, *flags = shlex.split(command)
            flag, value = flags[-1].split("=", 1)
            if flag == "--ckpt" and not Path(value).exists():
                print(f"{command}\npassed over: there is no {value}, train it first")
                continue
            row = beside(motion_of(flags), motion_of(flags[:-1]))
            print(command)
            print(", ".join(f"{name} {x:.2f}" for name, x in row.items()))


if __name__ == "__main__":
    run(main)
