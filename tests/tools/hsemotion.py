"""Label clips by HSEmotion, the classifier of the paper (pip install hsemotion-onnx): a table for
data.py.

    python tests/tools/hsemotion.py --videos=DIR > clips.csv
    python data.py --videos=DIR --clips=clips.csv ...

and --clips=FILE, if there is a table already. One frame in 16 votes. A folder or a table that names
an emotion is believed. A clip that cannot be read is named on stderr."""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import data
from moda import EMOTIONS, NO_EMOTION

COLUMNS = "video audio start end crop emotion speaker".split()


def vote(net, path, crop):
    """The emotion that most frames show."""
    votes = []
    for images in data.pictures(path, crop):
        name, scores = net.predict_emotions(images[0].numpy())
        votes.append(name.lower())
    return max(votes, key=votes.count)


def main(argv):
    from hsemotion_onnx.facial_emotions import HSEmotionRecognizer
    settings = data.Settings()
    data.parse_flags(argv, __doc__, settings)
    net = HSEmotionRecognizer("enet_b0_8_best_vgaf")
    out = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore")
    out.writeheader()
    for row in data.find_clips(settings).values():
        path = Path(settings.videos, row["video"] + row["span"])
        emotion = EMOTIONS[row["emotion"]]
        try:
            if row["emotion"] == NO_EMOTION:
                emotion = vote(net, path, row["crop"] or settings.crop)
        except ValueError as error:
            print(error, file=sys.stderr)
        out.writerow(row | dict(emotion=emotion))


if __name__ == "__main__":
    data.run(main)
