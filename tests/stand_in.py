"""A stand-in for LivePortrait in data.py: the motion that its M sees is known.

    python tests/stand_in.py --videos=DIR --data_dir=DIR --weights=unused

is data.py with it, slowed down, so that a test can kill it halfway."""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from moda import MOUTH


def brightness(mouth):
    """How bright a picture stands for a mouth's opening, -0.08..0.12 -> 0..1."""
    return 5 * (mouth + 0.08)


class LivePortrait:
    """Its M sees a mouth as open as the picture is bright, in the mean pose of the training set."""

    device = torch.device("cpu")
    seconds = 0.0                    # that M takes

    def __init__(self, *args):
        pass

    def M(self, images):
        time.sleep(self.seconds)
        B = len(images)
        grey = images.mean((1, 2, 3))[:, None]
        exp = torch.zeros(B, 63)
        exp[:, MOUTH] = grey[:, 0] / 5 - 0.08
        return dict(exp=exp,
                    kp=grey.expand(B, 63),
                    scale=torch.full((B, 1), 1.28),
                    t=torch.tensor([0, 0.1, 0]).expand(B, 3),
                    pitch=bins(-2).expand(B, 66),
                    yaw=bins(0).expand(B, 66),
                    roll=bins(0).expand(B, 66))


def bins(angle):
    """Scores of 66 bins, 3 degrees apart, whose mean is the angle."""
    return -((torch.arange(66) * 3 - 97.5 - angle) / 3) ** 2


if __name__ == "__main__":
    LivePortrait.seconds = 0.02
    data.LivePortrait = LivePortrait
    data.run(data.main)
