"""Look at a data set before training on it: what it holds, beside what the released model was trained
on, and odd clips.

    python tests/tools/check.py --data_dir=data/mine

Flags:
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import Clips, UsageError, opened, parse_flags, run, table
from moda import EMOTIONS, MOUTH

# mean and standard deviation of some channels, as published with the released model
PUBLISHED = table("""
    name   channel  mean     std
    scale  63       1.2865   0.0691
    pitch  67       -2.3407  8.8819
    yaw    68       -0.2464  23.8553
    roll   69       -0.3269  5.6063
    mouth  58       -0.0056  0.0214""")
JUMP = 0.06                      # of scale or translation in a frame; talking heads reach 0.02


@dataclass
class Settings:
    data_dir: str = ""           # the data set


def voice_lag(mouth, loud, reach=15):
    """By how many frames the voice follows the mouth where both agree best; how well they agree."""
    mouth, loud = np.diff(mouth), np.diff(loud)    # what drifts agrees with anything
    middle = mouth[reach:-reach]
    fit = np.correlate(loud, middle) / (len(middle) * mouth.std() * loud.std() + 1e-9)
    return fit.argmax() - reach, fit.max()


def check(folder):
    """Print what a data set holds beside what the released model was trained on, and odd clips."""
    data = Clips(folder, split="")
    hours = data.lengths.sum() / (25 * 3600)
    print(f"{folder}: {len(data.lengths)} clips, {hours:.2f} h, {len(data)} windows")
    counts = [f"{name} {data.emotion.count(k)}" for k, name in enumerate(EMOTIONS)]
    print("emotions:", ", ".join(counts))
    for name, channel, mean, std in PUBLISHED:
        ours = data.moments[:, channel]
        print(f"{name:6}{ours[0]:9.4f} +- {ours[1]:7.4f}, published{mean:9.4f} +- {std:7.4f}")
    for path in data.names:
        motion, loudness, *_ = opened(path, "motion", "loudness", "audio", "identity")
        lag, fit = voice_lag(motion[:, MOUTH], loudness)
        if fit > 0.3 and abs(lag) > 3:
            print(f"{path}: voice {lag:+d} frames after the lips (correlation {fit:.2f})")
        if np.abs(np.diff(motion[:, 63:66], axis=0)).max() > JUMP:
            print(f"{path}: jumps; is the video cut, or the face lost?")


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if not settings.data_dir:
        raise UsageError("needed: --data_dir=FOLDER")
    check(settings.data_dir)


if __name__ == "__main__":
    run(main)
