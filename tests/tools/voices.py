"""How a toy's mouth follows real recordings, loud and soft ones alike.

    python tests/tools/voices.py FOLDER          any sound or video in it that ffmpeg reads

Each is heard at five gains, in floating point and so without clipping, as sample.py hears it. The
first columns: correlation of the mouth's opening, frame by frame, with the rms amplitude of the
recording between 300 and 3400 Hz, where speech is. The last ones: with the mouth at 0 dB. Music is
in that band as well, so that the mouth should not follow it all. Flags:
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import sample
from data import FRAME, RATE, load_audio, log_mel_blocks, parse_flags, run
from moda import MOUTH
from renderer import Sketch

GAINS = -24, -12, 0, 12, 24      # dB


@dataclass
class Settings:
    ckpt: str = "out/toy/ckpt.pt"  # a model that takes log-mel features
    seconds: int = 30            # of each recording, from its start
    seed: int = 1                # of the noise


def speech_level(wav):
    """rms between 300 and 3400 Hz of each frame that has begun: (N,) -> (T,)."""
    spectrum = np.fft.rfft(wav)
    hz = np.fft.rfftfreq(len(wav), 1 / RATE)
    spectrum[(hz < 300) | (hz > 3400)] = 0
    speech = np.fft.irfft(spectrum, len(wav))
    speech = np.pad(speech, (0, -len(speech) % FRAME))
    return np.square(speech).reshape(-1, FRAME).mean(1) ** 0.5


def mouth(settings, model, wav):
    """The mouth's opening that sample.py generates, with its defaults: (N,) -> (T,)."""
    motion = sample.motion_of(settings, model, Sketch().source(), log_mel_blocks([wav]), [])
    return np.concatenate([piece[:, MOUTH] for piece in motion])


def correlations(settings, model, wav):
    """With the speech at each of GAINS, and with the mouth at 0 dB."""
    level = speech_level(wav)
    mouths = [mouth(settings, model, wav * np.float32(10 ** (gain / 20))) for gain in GAINS]
    middle = mouths[GAINS.index(0)]
    with_speech = [np.corrcoef(track, level)[0, 1] for track in mouths]
    with_middle = [np.corrcoef(track, middle)[0, 1] for track in mouths]
    return with_speech + with_middle


def show(name, cells):
    print(f"{name:32.32}", *[f"{cell:>6}" for cell in cells])


def main(argv):
    folders = [arg for arg in argv if not arg.startswith("--")]
    settings = Settings()
    parse_flags([arg for arg in argv if arg not in folders], __doc__, settings)
    if len(folders) != 1:
        raise ValueError("which folder? python tests/tools/voices.py FOLDER")
    defaults = sample.Settings(ckpt=settings.ckpt, seed=settings.seed)
    model = sample.open_model(defaults, given={})
    show("", ["speech"] + [""] * len(GAINS) + ["0 dB"])
    show("dB", [*GAINS, *GAINS])
    rows = []
    for path in sorted(Path(folders[0]).iterdir()):
        try:
            wav = load_audio(path)[:settings.seconds * RATE]
        except ValueError:
            continue                               # no sound
        rows.append(correlations(defaults, model, wav))
        show(path.name, [f"{x:.2f}" for x in rows[-1]])
    if not rows:
        raise ValueError(f"{folders[0]}: no sound there that ffmpeg reads")
    show("mean", [f"{x:.2f}" for x in np.mean(rows, 0)])
    show("worst", [f"{x:.2f}" for x in np.min(rows, 0)])


if __name__ == "__main__":
    run(main)
