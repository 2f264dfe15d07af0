"""Label videos by HSEmotion, the classifier of the paper (pip install hsemotion-onnx): a table for
data.py.

    python tests/tools/hsemotion.py --videos=DIR > labels.csv
    python data.py --videos=DIR --labels=labels.csv ...

One frame in 16 votes. Videos in a folder that names an emotion keep it. A video that cannot be read
is named on stderr."""
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import data
from moda import NO_EMOTION


@dataclass
class Settings:
    videos: str = ""             # folder of talking videos, searched deeply
    crop: str = ""               # x,y,size: the square around the face; else the central one


def vote(net, path, crop):
    """The emotion that most frames show."""
    votes = []
    for images in data.pictures(path, crop):
        name, scores = net.predict_emotions(images[0].numpy())
        votes.append(name.lower())
    return max(votes, key=votes.count)


def main(argv):
    from hsemotion_onnx.facial_emotions import HSEmotionRecognizer
    settings = Settings()
    data.parse_flags(argv, __doc__, settings)
    net = HSEmotionRecognizer("enet_b0_8_best_vgaf")
    out = csv.writer(sys.stdout)
    out.writerow(["clip", "emotion"])
    for name in data.find_videos(settings.videos):
        if data.label_of(name, data.LABELS) != NO_EMOTION:
            continue
        try:
            out.writerow([name.as_posix(), vote(net, Path(settings.videos, name), settings.crop)])
        except ValueError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
