"""The paper's data sets as they lie on a disk, or a folder with sounds apart -> a table of clips.

    python tests/tools/table.py --hdtf=HDTF --celebv=CelebV-Text --mead=MEAD > clips.csv
    python data.py --clips=clips.csv --data_dir=data/all --weights=pretrained_weights

Any of them may be left out. What is listed without a video, and sounds that are missing, are counted
on stderr. A folder's sounds have the names of its videos and lie beside them, or where their path has
"audio" for "video". Flags:
"""
import csv
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import data
from data import VIDEO, parse_flags, run

SOUNDS = ".wav .flac .m4a .aac .mp3 .ogg .opus".split()
COLUMNS = "video audio start end crop emotion speaker".split()
GAPS = Counter()                 # what is missing, by kind


@dataclass
class Settings:
    hdtf: str = ""               # folder of HDTF's videos, with the authors' HDTF_dataset in it
    celebv: str = ""             # folder of CelebV-Text's videos and audios
    mead: str = ""               # folder of MEAD's actors
    views: str = "front"         # of MEAD, with commas
    videos: str = ""             # any other folder


# ------------------------------------------------------------------------------------------- HDTF
def read_lines(path):
    """Lines of the authors' files -> {first word: the other words}."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {name: words for name, *words in lines}


def seconds(time):
    """"01:30" -> 90."""
    total = 0
    for part in time.split(":"):
        total = 60 * total + int(part)
    return total


def hdtf(folder):
    """A clip for each span of a video, with its own square, scaled to the video's height; a speaker
    is a video's name without its last number."""
    for part in "RD", "WDA", "WRA":
        texts = [read_lines(folder / f"HDTF_dataset/{part}_{what}.txt")
                 for what in ("resolution", "annotion_time", "crop_wh")]
        resolutions, times, squares = texts
        for name, spans in times.items():
            video = folder / name
            if not video.exists():
                GAPS["HDTF's videos"] += 1
                continue
            height = next(imageio_ffmpeg.read_frames(video))["size"][1]
            zoom = height / int(resolutions[name][0])
            speaker = re.sub(r"\d+$", "", video.stem)
            for k, span in enumerate(spans):
                square = squares.get(f"{video.stem}_{k}.mp4")
                if not square:
                    GAPS["HDTF's squares"] += 1
                    continue
                x, width, y, high = [int(zoom * int(number)) for number in square]
                start, end = map(seconds, span.split("-"))
                yield dict(video=video, start=start, end=end, speaker=speaker,
                           crop=f"{x},{y},{min(width, high)}")


# --------------------------------------------------------------------- CelebV-Text, MEAD, the rest
def sound_at(place, gap):
    """A sound file at a place, which lacks its suffix; "" if there is none."""
    for suffix in SOUNDS:
        if place.with_name(place.name + suffix).exists():
            return place.with_name(place.name + suffix)
    GAPS[gap] += 1
    return ""                                      # the video's own, if it has one


def celebv(folder):
    """videos/NAME_3.mp4 with audios/NAME_3.m4a; NAME, an address at YouTube, is the speaker."""
    for video in sorted((folder / "videos").iterdir()):
        if VIDEO.search(video.name):
            audio = sound_at(folder / "audios" / video.stem, "CelebV-Text's sounds")
            yield dict(video=video, audio=audio, speaker=re.sub(r"_\d+$", "", video.stem))


def mead(folder, views):
    """M003/video/front/angry/level_1/001.mp4 with M003/audio/angry/level_1/001.m4a."""
    for view in views.split(","):
        for video in sorted(folder.glob(f"*/video/{view}/*/*/*")):
            actor, _, _, emotion, level, name = video.relative_to(folder).parts
            place = folder / actor / "audio" / emotion / level / video.stem
            audio = sound_at(place, "MEAD's sounds")
            yield dict(video=video, audio=audio, emotion=emotion, speaker=actor)


def folder_of(root):
    """Any videos; where there is no sound apart, their own counts, and nothing is missing."""
    for name, row in data.find_clips(data.Settings(videos=root)).items():
        video = Path(root, row["video"])
        apart = Path(re.sub("(.*)video(.*/)", r"\1audio\2", str(video)))
        sounds = [path.with_suffix(kind) for path in (video, apart) for kind in SOUNDS]
        audio = next(filter(Path.exists, sounds), "")
        emotion = data.EMOTIONS[row["emotion"]]
        speaker = row["speaker"]
        if re.fullmatch("(?i)videos?", speaker):   # the folder of them all is nobody
            speaker = video.stem
        yield dict(video=video, audio=audio, emotion=emotion, speaker=speaker)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    out = csv.DictWriter(sys.stdout, COLUMNS, restval="")
    out.writeheader()
    if settings.hdtf:
        out.writerows(hdtf(Path(settings.hdtf)))
    if settings.celebv:
        out.writerows(celebv(Path(settings.celebv)))
    if settings.mead:
        out.writerows(mead(Path(settings.mead), settings.views))
    if settings.videos:
        out.writerows(folder_of(settings.videos))
    for what, count in GAPS.items():
        print(f"{count} of {what} are missing", file=sys.stderr)


if __name__ == "__main__":
    run(main)
