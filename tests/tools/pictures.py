"""The README's pictures, from a trained toy: moda.png, curve.png, attention.png, emotions.png and
talk.gif; pip install matplotlib, then

    python tests/tools/pictures.py

Prints how much of the attention from motion to audio lies near the diagonal. Flags:
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import sample
from data import RATE, ToyTalker, load_audio, parse_flags, run, toy_clip
from moda import EMOTIONS, M, MoDA, generate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = [name for name in EMOTIONS if name != "none"]
HEAD = 106, 120, 406, 420        # pixels of a frame that the head fills


@dataclass
class Settings:
    ckpt: str = "out/toy/ckpt.pt"  # a trained toy, and the log.csv beside it
    out: str = "assets"          # where the pictures go
    voice: str = ""              # any sound; else a made-up one


def talking(settings, folder, emotion):
    """The frames of the video that sample.py makes of the voice."""
    if settings.voice:
        wav = load_audio(settings.voice)
    else:
        wav, *_ = toy_clip(7, 125)
    soundfile.write(folder / "voice.wav", wav[:5 * RATE], RATE)
    sample.main([f"--ckpt={settings.ckpt}", f"--audio_path={folder}/voice.wav",
                 f"--output_path={folder}/video.mp4", f"--emotion={emotion}"])
    video = imageio_ffmpeg.read_frames(folder / "video.mp4")
    next(video)                                    # what it is: size, rate ..
    return [Image.frombytes("RGB", (512, 512), frame) for frame in video]


# --------------------------------------------------------------------------------------- the losses
def curve(settings, path):
    """Losses of every step, and their running mean."""
    log = Path(settings.ckpt).with_name("log.csv")
    rows = np.genfromtxt(log, delimiter=",", names=True)
    width = min(41, len(rows) // 2 * 2 - 1)
    middle = slice(width // 2, len(rows) - width // 2)
    figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
    losses = [("rf", "L_RF (Eq. 4)", "#407688"), ("vel", "L_vel (Eq. 5)", "#c83c3c")]
    for name, label, colour in losses:
        mean = np.convolve(rows[name], np.ones(width) / width, "valid")
        axes.semilogy(rows["step"], rows[name], color=colour, alpha=0.25, linewidth=0.5)
        axes.semilogy(rows["step"][middle], mean, color=colour, label=label)
    axes.set_xlabel("step")
    axes.legend()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------- the emotions
def emotions(settings, folder, path):
    """The same voice in eight emotions: a row each, a frame every half second."""
    rows = []
    for emotion in SHOWN:
        frames = talking(settings, folder, emotion)[10::12][:9]
        heads = [frame.crop(HEAD).resize((112, 112), Image.LANCZOS) for frame in frames]
        rows.append(np.hstack([np.asarray(head) for head in heads]))
    figure, axes = plt.subplots(figsize=(9, 7.4), layout="constrained")
    axes.imshow(np.vstack(rows))
    axes.set_yticks(56 + 112 * np.arange(len(SHOWN)), SHOWN)
    axes.set_xticks(56 + 112 * np.arange(9), [f"{(10 + 12 * k) / 25:.1f} s" for k in range(9)])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=90)


def gif(settings, folder, path):
    """Four emotions side by side, at 12.5 frames per second."""
    videos = []
    for emotion in ("neutral", "happiness", "sadness", "surprise"):
        frames = talking(settings, folder, emotion)[:100:2]
        videos.append([np.asarray(frame.resize((180, 180), Image.LANCZOS)) for frame in frames])
    strips = [np.hstack(four) for four in zip(*videos)]
    palette = Image.fromarray(np.vstack(strips[::10])).quantize(128)
    images = []
    for strip in strips:
        image = Image.fromarray(strip)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0,
                   optimize=True)


# ------------------------------------------------------------------------------------ the attention
def attention_weights(model, audio, identity, emotion):
    """Softmax weights (H, queries, keys) of every block in the last Euler step."""
    seen = []
    plain = F.scaled_dot_product_attention

    def recorded(q, k, v):
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
        seen.append(weights[0])
        return plain(q, k, v)
    F.scaled_dot_product_attention = recorded
    try:
        generate(model, audio, identity, torch.zeros(M), emotion, steps=10, guidance={},
                 chunk=len(audio))
    finally:
        F.scaled_dot_product_attention = plain
    blocks = len(seen) // 10
    return seen[-blocks:]


def attention(settings, path):
    """How much motion attends to audio in the most diagonal head of each block."""
    model, talker = MoDA.from_pretrained(settings.ckpt), ToyTalker("val", 1)
    clip, N = talker.clips[0], 80
    audio, identity = torch.tensor(clip["audio"][:N]), torch.tensor(clip["identity"])
    blocks = attention_weights(model, audio, identity, talker.emotion[0])
    names = ["four streams"] * len(model.four) + ["two streams"] * len(model.two)
    names += ["one stream"] * len(model.one)
    figure, panels = plt.subplots(1, len(blocks), figsize=(3.2 * len(blocks), 3.5),
                                  layout="constrained")
    for panel, weights, name in zip(panels, blocks, names):
        to_audio = weights[:, :N, N:2 * N]                             # (H, motion, audio)
        head = int(to_audio.diagonal(dim1=1, dim2=2).sum(-1).argmax())
        part = to_audio[head]
        panel.imshow(part / part.sum(-1, keepdim=True), cmap="magma", origin="lower")
        panel.set_title(f"{name}, head {head}", fontsize=10)
        panel.set_xlabel("audio frame")
        panel.set_ylabel("motion frame")
        near = sum(part.diagonal(offset=d).sum() for d in range(-2, 3)) / part.sum()
        print(f"{name}, head {head}: {near:.0%} of what motion gives to audio lies within two "
              f"frames of the diagonal ({5 / N:.0%} if spread evenly)")
    figure.savefig(path, dpi=100)


# -------------------------------------------------------------------------------------- the network
INK = "#404858"
BLUE, SAND, ROSE, GREEN = "#cfe3ea", "#f3d9b8", "#e8cfe0", "#d5e6c8"
INPUTS = [
    ("noisy motion z\n+ the frame before", BLUE, "m"),
    ("audio\n12 x 768 per frame", SAND, "a"),
    ("emotion\n0..8", ROSE, "e"),
    ("identity\n21 x 3", GREEN, "i")]
STAGES = [(267, "3 four-stream blocks"), (437, "6 two-stream blocks"),
          (607, "12 single-stream blocks")]


def drawing(path):
    """The network, from left to right."""
    figure, axes = plt.subplots(figsize=(9.2, 4), layout="constrained")

    def box(x, y, width, height, colour, text):
        patch = plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK)
        axes.add_patch(patch)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(x, y, dx, dy=0):
        style = dict(arrowstyle="->", color=INK)
        axes.annotate("", (x + dx, y + dy), (x, y), arrowprops=style)

    for row, (text, colour, token) in enumerate(INPUTS):
        y = 240 - 70 * row
        box(0, y, 125, 48, colour, text)
        box(145, y, 34, 48, colour, token)
        box(212, y, 110, 48, colour, "own weights")
        arrow(125, y + 24, 20)
        arrow(179, y + 24, 33)
    box(382, 240, 110, 48, BLUE, "m")
    box(382, 30, 110, 188, "#ecdccf", "a e i\none stream")
    box(552, 30, 110, 258, "#e3e1ea", "m a e i\none stream")
    box(712, 130, 92, 58, BLUE, "velocity v\n70 per frame")
    for y in (264, 194, 124, 54):
        arrow(322, y, 60)
    arrow(492, 264, 60)
    arrow(492, 124, 60)
    arrow(662, 159, 50)
    box(212, -72, 450, 38, "#fdf3d0",
        "time t + emotion: shift, scale and gate of every block (AdaLN)")
    for x, text in STAGES:
        axes.text(x, 10, text, ha="center", fontsize=9, weight="bold")
        arrow(x, -34, 0, 34)
    axes.text(437, 306, "every token attends to all others; frame n of every stream is turned by "
                        "one angle (aligned RoPE)", ha="center", fontsize=9)
    axes.set_xlim(-5, 812)
    axes.set_ylim(-80, 325)
    axes.axis("off")
    figure.savefig(path, dpi=100)


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    out = Path(settings.out)
    out.mkdir(exist_ok=True)
    drawing(out / "moda.png")
    curve(settings, out / "curve.png")
    attention(settings, out / "attention.png")
    with tempfile.TemporaryDirectory() as folder:
        emotions(settings, Path(folder), out / "emotions.png")
        gif(settings, Path(folder), out / "talk.gif")


if __name__ == "__main__":
    run(main)
