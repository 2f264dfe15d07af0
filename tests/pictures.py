"""The README's pictures, from a trained toy: pip install matplotlib, then

    python tests/pictures.py

    --ckpt=out/toy/ckpt.pt   and the log.csv beside it
    --out=assets             moda.png, curve.png, attention.png, emotions.png, talk.gif
    --voice=                 any sound; a made-up one without
"""
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import numpy as np
import soundfile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import moda
import sample
from data import RATE, ToyTalker, load_audio, parse_flags, toy_clip
from moda import EMOTIONS, MoDA

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOODS = [name for name in EMOTIONS if name != "none"]
FACE = 106, 120, 406, 420                          # pixels of a frame that the head fills


def spoken(flags, folder, emotion):
    """The frames of the film that sample.py makes of the voice."""
    wav = load_audio(flags["voice"]) if flags["voice"] else toy_clip(7, 125)[0]
    soundfile.write(folder / "voice.wav", wav[:5 * RATE], RATE)
    sample.main([f"--ckpt={flags['ckpt']}", f"--audio_path={folder}/voice.wav", f"--output_path={folder}/film.mp4",
                 f"--emotion={emotion}"])
    film = imageio_ffmpeg.read_frames(folder / "film.mp4")
    next(film)
    return [Image.frombytes("RGB", (512, 512), frame) for frame in film]


def curve(flags, path):
    """Losses of every step, and their running mean."""
    rows = np.genfromtxt(Path(flags["ckpt"]).with_name("log.csv"), delimiter=",", names=True)
    figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
    for name, label, colour in (("rf", "L_RF (Eq. 4)", "#407688"), ("vel", "L_vel (Eq. 5)", "#c83c3c")):
        axes.semilogy(rows["step"], rows[name], color=colour, alpha=0.25, linewidth=0.5)
        axes.semilogy(rows["step"][20:-20], np.convolve(rows[name], np.ones(41) / 41, "valid"), color=colour, label=label)
    axes.set_xlabel("step")
    axes.legend()
    figure.savefig(path, dpi=110)


def emotions(flags, folder, path):
    """The same voice in eight emotions: a row each, a frame every half second."""
    rows = []
    for mood in MOODS:
        film = spoken(flags, folder, mood)
        rows.append(np.hstack([np.asarray(frame.crop(FACE).resize((112, 112), Image.LANCZOS)) for frame in film[10::12][:9]]))
    figure, axes = plt.subplots(figsize=(9, 7.4), layout="constrained")
    axes.imshow(np.vstack(rows))
    axes.set_yticks(56 + 112 * np.arange(len(MOODS)), MOODS)
    axes.set_xticks(56 + 112 * np.arange(9), [f"{(10 + 12 * k) / 25:.1f} s" for k in range(9)])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=90)


def attention(flags, path):
    """How much motion looks at the voice in each block's most diagonal head, in the last Euler step."""
    model, talker, seen = MoDA.from_pretrained(flags["ckpt"]), ToyTalker("val", 1), []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, mask=None):
        seen.append((q @ k.mT / q.size(-1) ** 0.5).softmax(-1))            # (B, H, queries, keys)
        return plain(q, k, v, mask)
    _, audio, identity = talker.clips[0].values()
    torch.nn.functional.scaled_dot_product_attention = recorded
    try:
        sample.sample(model, audio[:80], identity, torch.zeros(moda.M), talker.emotion[0], guidance={}, chunk=80)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    blocks = len(seen) // 10
    figure, panels = plt.subplots(1, blocks, figsize=(3.2 * blocks, 3.2), layout="constrained")
    for panel, weights, name in zip(panels, seen[-blocks:], ("four streams", "two streams", "one stream")):
        part = weights[0, :, :80, 80:160]                                  # (H, motion, audio)
        head = int(part.diagonal(dim1=1, dim2=2).sum(-1).argmax())
        panel.imshow(part[head] / part[head].sum(-1, keepdim=True), cmap="magma", origin="lower")
        panel.set_title(f"{name}, head {head}", fontsize=10)
        panel.set_xlabel("audio frame")
        panel.set_ylabel("motion frame")
        on = [float(part[head].diagonal(offset=d).sum() / part[head].sum()) for d in range(-2, 3)]
        print(f"{name}, head {head}: {sum(on):.0%} of what motion gives to audio lies within two frames of the diagonal "
              f"({5 * 80 / 6400:.0%} if spread evenly)")
    figure.savefig(path, dpi=100)


def drawing(path):
    """The network, from left to right."""
    figure, axes = plt.subplots(figsize=(9.2, 4), layout="constrained")
    blue, sand, rose, green = colours = "#cfe3ea", "#f3d9b8", "#e8cfe0", "#d5e6c8"

    def box(x, y, width, height, colour, text):
        axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="#404858"))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(x, y, dx, dy=0):
        axes.annotate("", (x + dx, y + dy), (x, y), arrowprops=dict(arrowstyle="->", color="#404858"))
    inputs = ("noisy motion z\n+ the frame before", "voice\n12 x 768 per frame", "emotion\n0..8", "identity\n21 x 3")
    for row, (text, colour, token) in enumerate(zip(inputs, colours, "maei")):
        y = 240 - 70 * row
        box(0, y, 125, 48, colour, text)
        box(145, y, 34, 48, colour, token)
        box(212, y, 110, 48, colour, "own weights")
        arrow(125, y + 24, 20)
        arrow(179, y + 24, 33)
    box(382, 240, 110, 48, blue, "m")
    box(382, 30, 110, 188, "#ecdccf", "a e i\none stream")
    box(552, 30, 110, 258, "#e3e1ea", "m a e i\none stream")
    box(712, 130, 92, 58, blue, "velocity v\n70 per frame")
    arrow(322, 264, 60)
    for y in (194, 124, 54):
        arrow(322, y, 60)
    for x, y in ((492, 264), (492, 124), (662, 159)):
        arrow(x, y, 60 if x < 600 else 50)
    box(212, -72, 450, 38, "#fdf3d0", "time t + emotion: shift, scale and gate of every block (AdaLN)")
    for x, text in ((267, "3 four-stream blocks"), (437, "6 two-stream blocks"), (607, "12 single-stream blocks")):
        axes.text(x, 10, text, ha="center", fontsize=9, weight="bold")
        arrow(x, -34, 0, 34)
    axes.text(437, 306, "every token attends to all others; frame n of every stream is turned by one angle (aligned RoPE)",
              ha="center", fontsize=9)
    axes.set_xlim(-5, 812)
    axes.set_ylim(-80, 325)
    axes.axis("off")
    figure.savefig(path, dpi=100)


def gif(flags, folder, path):
    """Four emotions side by side, at 12.5 frames per second."""
    films = [spoken(flags, folder, mood) for mood in ("neutral", "happiness", "sadness", "surprise")]
    strips = [np.hstack([np.asarray(frame.resize((180, 180), Image.LANCZOS)) for frame in four])
              for four in zip(*(film[:100:2] for film in films))]
    palette = Image.fromarray(np.vstack(strips[::10])).quantize(128)
    images = [Image.fromarray(strip).quantize(palette=palette, dither=Image.Dither.NONE) for strip in strips]
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0, optimize=True)


def main(argv):
    flags = parse_flags(__doc__, argv)
    out = Path(flags["out"])
    out.mkdir(exist_ok=True)
    drawing(out / "moda.png")
    curve(flags, out / "curve.png")
    attention(flags, out / "attention.png")
    with tempfile.TemporaryDirectory() as folder:
        emotions(flags, Path(folder), out / "emotions.png")
        gif(flags, Path(folder), out / "talk.gif")


if __name__ == "__main__":
    main(sys.argv[1:])
