"""Look at a data set before training on it: odd clips, what it holds beside what the released model
was trained on, and a picture of both.

    python tests/tools/check.py --data_dir=data/mine

The picture needs matplotlib (pip install matplotlib). Flags:
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import Clips, UsageError, opened, parse_flags, plain, read_labels, run, table
from moda import EMOTIONS, MOUTH, NO_EMOTION

# mean and standard deviation of some channels, as published with the released model
PUBLISHED = table("""
    name   channel  mean     std
    scale  63       1.2865   0.0691
    pitch  67       -2.3407  8.8819
    yaw    68       -0.2464  23.8553
    roll   69       -0.3269  5.6063
    mouth  58       -0.0056  0.0214""")
BINS = np.linspace(-4, 4, 81)    # of the histograms, in published standard deviations
JUMP = 0.06                      # of scale or translation in a frame; talking heads reach 0.02
LISTED = 20                      # clips without emotion, before the others are counted


@dataclass
class Settings:
    data_dir: str = ""           # the data set
    labels: str = ""             # the csv that was given to data.py: are all its rows used?
    report: str = "report.png"   # the picture; empty: none


def voice_lag(mouth, loud, reach=15):
    """By how many frames the voice follows the mouth where both agree best; how well they agree."""
    mouth, loud = np.diff(mouth), np.diff(loud)    # what drifts agrees with anything
    middle = mouth[reach:-reach]
    fit = np.correlate(loud, middle) / (len(middle) * mouth.std() * loud.std() + 1e-9)
    return fit.argmax() - reach, fit.max()


def look(path):
    """Print what is odd in a clip -> how many frames lie in which bin (5, 80), and the voice's lag
    or None."""
    motion, loudness, *_ = opened(path, "motion", "loudness", "audio", "identity")
    lag, fit = voice_lag(motion[:, MOUTH], loudness)
    if fit > 0.3 and abs(lag) > 3:
        print(f"{path}: voice {lag:+d} frames after the lips (correlation {fit:.2f})")
    if np.abs(np.diff(motion[:, 63:66], axis=0)).max() > JUMP:
        print(f"{path}: jumps; is the video cut, or the face lost?")
    counts = []
    for name, channel, mean, std in PUBLISHED:
        off = (motion[:, channel] - mean) / std
        counts.append(np.histogram(off.clip(-4, 4), BINS)[0])
    return np.array(counts), lag if fit > 0.3 else None


def unused(labels, rows):
    """Labels that fit no clip of a manifest."""
    used = set()
    for row in rows:
        path = plain(row["video"])
        used.update([path, *path.split("/")])
    return sorted(read_labels(labels).keys() - used)


def check(folder, labels=""):
    """Print what is odd, then a summary -> Clips, counts of all frames (5, 80), voice lags."""
    data = Clips(folder, split="")
    counts, lags = 0, []
    for path in data.names:
        counts_here, lag = look(path)
        counts = counts + counts_here
        if lag is not None:
            lags.append(lag)
    unlabelled = [path for path, k in zip(data.names, data.emotion) if k == NO_EMOTION]
    for path in unlabelled[:LISTED]:
        print(f"{path}: no emotion")
    if len(unlabelled) > LISTED:
        print(f"and {len(unlabelled) - LISTED} more without emotion")
    manifest = json.loads(Path(folder, "manifest.json").read_text())
    left_out = manifest.get("left_out", {})
    for label in unused(labels, manifest["clips"]) if labels else []:
        print(f"{labels}: no clip is called {label}")
    for reason in left_out.values():
        print(f"left out: {reason}")

    hours = data.lengths.sum() / (25 * 3600)
    print(f"{folder}: {len(data.lengths)} clips, {hours:.2f} h, {len(data)} windows; "
          f"{len(left_out)} left out")
    names = [f"{name} {data.emotion.count(k)}" for k, name in enumerate(EMOTIONS)]
    print("emotions:", ", ".join(names))
    for name, channel, mean, std in PUBLISHED:
        ours = data.moments[:, channel]
        print(f"{name:6}{ours[0]:9.4f} +- {ours[1]:7.4f}, published{mean:9.4f} +- {std:7.4f}")
    return data, counts, lags


def draw(path, data, counts, lags):
    """The picture: histograms over the published mean and standard deviation, lags, emotions."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
    axes = axes.flat
    for (name, channel, mean, std), n, axis in zip(PUBLISHED, counts, axes):
        axis.axvspan(mean - std, mean + std, color="#d8e4e8", label="published mean, std")
        axis.axvline(mean, color="#969696")
        axis.stairs(n / n.sum(), mean + std * BINS, fill=True, color="#407688", label="this set")
        axis.set(title=name, yticks=[])
    axes[0].legend()
    axes[5].hist(lags, np.arange(-15.5, 16), color="#407688")
    axes[5].set(title="voice after the lips", xlabel="frames", ylabel="clips")
    axes[6].barh(EMOTIONS, [data.emotion.count(k) for k in range(len(EMOTIONS))], color="#407688")
    axes[6].set(title="emotions", xlabel="clips")
    axes[7].hist(data.lengths / 25, 40, color="#407688")
    axes[7].set(title="length", xlabel="seconds", ylabel="clips")
    figure.savefig(path, dpi=80)
    print(path)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if not settings.data_dir:
        raise UsageError("needed: --data_dir=FOLDER")
    found = check(settings.data_dir, settings.labels)
    if settings.report:
        draw(settings.report, *found)


if __name__ == "__main__":
    run(main)
