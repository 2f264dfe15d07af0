"""What a linear model does on the clips of sample.py --eval: a baseline for its table.

    python tests/tools/linear.py                     the toy's
    python tests/tools/linear.py --data_dir=data/mine    a data set's

Ridge regression, in closed form, of all 70 motion numbers on seven frames of features, fitted to 60
training clips. It knows neither emotion nor identity nor the frame before. Flags:
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import sample
from data import Clips, ToyTalker, parse_flags, run
from moda import Config, MotionModel


@dataclass
class Settings:
    data_dir: str = ""           # a data set prepared by data.py; else the toy talker
    clips: int = 60              # training clips to learn from


def linear_baseline(model, training, audio, clips=60):
    """Normalised motion for audio (K, T, L, A). Layers of features are averaged; beside them, and
    beyond a clip's ends, are ones."""
    z, heard, *_ = sample.beginnings(training, clips, model)
    seven = []
    for features in (heard, audio):
        padded = F.pad(features.mean(2), (0, 1, 3, 3), value=1)
        seven.append(padded.unfold(1, 7, 1).flatten(2))                # (K, T, 7 A + 7)
    x = seven[0].flatten(0, 1)
    gram = x.T @ x
    gram.diagonal().add_(0.03 * gram.diagonal().mean())
    return seven[1] @ torch.linalg.solve(gram, x.T @ z.flatten(0, 1))


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if settings.data_dir:
        data, training = Clips(settings.data_dir, "val"), Clips(settings.data_dir)
    else:
        data, training = ToyTalker("val", 16), ToyTalker("train", settings.clips)
    model = MotionModel(Config())                  # to normalise with
    model.mean[:], model.std[:] = training.moments
    truth, audio, *_ = sample.beginnings(data, 16, model)
    z = linear_baseline(model, training, audio, settings.clips)
    for metric, x in sample.compare(z, truth, model.std).items():
        print(f"{metric:17}{x:14.3}")


if __name__ == "__main__":
    run(main)
