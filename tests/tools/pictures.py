"""The README's pictures, from a trained toy; pip install matplotlib, then

    python tests/tools/pictures.py                   all of them
    python tests/tools/pictures.py --only=flow       one: talk, strip, emotions, keypoints, flow,
                                                     straight, network, attention or claims

claims takes its numbers from the table of tests/tools/README.md. Flags:
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
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import sample
from data import (FRAME, RATE, ToyTalker, UsageError, expression, load_audio, log_mel, parse_flags,
                  run, toy_clip)
from moda import (EMOTIONS, EXP, MOUTH, ROT, M, MoDA, euler, euler_times, generate, guidance_of,
                  guided_velocity)
from renderer import FACE, Sketch, keypoints

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch

INK, GREY, RED, TEAL = "#404858", "#969696", "#c83c3c", "#407688"
# of nine frames: no red, which is the generated mouth, no grey, which is the truth
NINE = [f"C{k}" for k in (0, 1, 2, 4, 5, 6, 8, 9)] + ["#20306c"]
HEAD = 66, 66, 446, 446          # pixels of a frame that the head fills
EIGHT = [name for name in EMOTIONS if name != "none"]


@dataclass
class Settings:
    ckpt: str = "out/toy/ckpt.pt"  # a trained toy
    student: str = "out/toy-straight/ckpt.pt"  # its student, by train.py --reflow
    out: str = "assets"          # where the pictures go
    only: str = ""               # the name of one picture; else all
    voice: str = ""              # any sound for talk and emotions; else a made-up one


# ------------------------------------------------------------------------------------ shared parts
def label(image, text, x, y, size=22, colour=INK):
    """Text centred at x, y."""
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((x, y), text, colour, font, anchor="mm")


def voice_of(settings, clip, frames=64):
    if settings.voice:
        return load_audio(settings.voice)[:frames * FRAME]
    wav, *_ = toy_clip(clip, frames)
    return wav


def talking(settings, wav, emotion):
    """Frames of the video that sample.py makes of a voice, and its motion."""
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/voice.wav", wav, RATE)
        sample.main([f"--ckpt={settings.ckpt}", f"--audio_path={folder}/voice.wav",
                     f"--output_path={folder}/video.mp4", f"--emotion={emotion}",
                     f"--save_motion={folder}/motion.npy"])
        video = imageio_ffmpeg.read_frames(f"{folder}/video.mp4")
        next(video)                                # what it is: size, rate ..
        frames = [Image.frombytes("RGB", (512, 512), frame) for frame in video]
        return frames, np.load(f"{folder}/motion.npy")


def save_figure(figure, path, colours=64):
    """In few colours: a small file."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(colours).save(path, optimize=True)


def plain(axes):
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


# --------------------------------------------------------------------------------- the talking face
def talk(settings, path):
    """Two emotions of one voice, labelled, with the voice and a playhead, 12.5 frames a second."""
    wav = voice_of(settings, 5)                    # a smile in its first frame
    shown = "happiness", "anger"
    videos = [talking(settings, wav, emotion)[0] for emotion in shown]
    loudness = np.abs(wav).reshape(-1, FRAME // 4).max(1)
    heights = 24 * loudness / loudness.max()
    images = []
    for k in range(0, len(videos[0]), 2):
        image = Image.new("RGB", (500, 330), "white")
        for side, frames in enumerate(videos):
            face = frames[k].crop(HEAD).resize((246, 246), Image.LANCZOS)
            image.paste(face, (254 * side, 30))
            label(image, shown[side], 123 + 254 * side, 14)
        draw = ImageDraw.Draw(image)
        now = k / len(videos[0])
        for bar, height in enumerate(heights):
            place = bar / len(heights)
            colour = TEAL if place < now else "#c8d4da"
            draw.line((500 * place, 303 - height, 500 * place, 303 + height), colour)
        draw.line((500 * now, 278, 500 * now, 328), RED, 3)
        images.append(image)
    palette = Image.fromarray(np.vstack(images[::10])).quantize(96)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.min(1) > 245] = 255            # the white of the page
    palette.putpalette(colours.flatten().tolist())
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0,
                   optimize=True)


def strip(settings, path):
    """The highest peak of the mouth of every second; the voice; the opening, true and generated."""
    # whose mouth is as wide as the drawn one, and so opens as far
    wav, true, emotion, _ = toy_clip((True, 11), 200)
    frames, motion = talking(settings, wav, EMOTIONS[emotion])
    # a mouth that closes since the second before counts in that one
    opening = torch.as_tensor(motion[:, MOUTH])
    peaks = opening == F.max_pool1d(opening[None], 3, stride=1, padding=1)[0]
    opening = opening.where(peaks, opening.min())
    widest = [k + int(opening[k:k + 25].argmax()) for k in range(0, 200, 25)]
    faces = [frames[k].crop(HEAD).resize((160, 160), Image.LANCZOS) for k in widest]
    figure = plt.figure(figsize=(9.6, 3.2), layout="constrained")
    rows = figure.subplots(3, height_ratios=[1.3, 0.6, 1.3])
    rows[0].imshow(np.hstack(faces), extent=(0, 8, 0, 1), aspect="auto")
    seconds = np.arange(len(wav)) / RATE
    # so that what is quiet is seen, too
    rows[1].plot(seconds, np.sign(wav) * np.sqrt(np.abs(wav)), color=TEAL, linewidth=0.4)
    rows[1].set_ylabel("voice\n(square root)", rotation=0, ha="right", va="center")
    seconds = np.arange(200) / 25
    rows[2].plot(seconds, true[:, MOUTH], color=GREY, linewidth=3, alpha=0.6, label="true")
    rows[2].plot(seconds, motion[:, MOUTH], color=RED, label="generated")
    rows[2].plot(seconds[widest], motion[widest, MOUTH], "o", color=RED, markersize=5,
                 label="the faces above")
    rows[2].set_ylabel("mouth's\nopening", rotation=0, ha="right", va="center")
    rows[2].set_ylim(top=1.4 * max(true[:, MOUTH].max(), motion[:, MOUTH].max()))
    rows[2].legend(loc="upper center", ncols=3, frameon=False)
    for k, frame in enumerate(widest):             # from the face down to its moment
        ends = dict(xyA=(k + 0.5, 0), xyB=(frame / 25, motion[frame, MOUTH]))
        line = ConnectionPatch(**ends, coordsA="data", coordsB="data", axesA=rows[0], axesB=rows[2],
                               color=RED, linewidth=0.7, alpha=0.5)
        figure.add_artist(line)
    rows[0].set_title(f"emotion: {EMOTIONS[emotion]}", fontsize=11)
    for row in rows:
        plain(row)
        row.set_xlim(0, 8)
    rows[2].set_xticks(range(9), [f"{k} s" for k in range(9)])
    save_figure(figure, path, 128)


def emotions(settings, path):
    """Eight faces at one vowel, where the mouth is widest."""
    wav, face = voice_of(settings, 3), Sketch()    # no blink where its mouth is widest
    told = sample.Settings(ckpt=settings.ckpt)
    model = sample.open_model(told, {})
    options = sample.sampling(told)
    rest = model.mean.clone()
    rest[EXP] = 0
    audio, x_c = log_mel(wav), torch.tensor(FACE).float().flatten()
    image = Image.new("RGB", (880, 500), "white")
    for k, emotion in enumerate(EIGHT):
        z = generate(model, audio, x_c, model.normalise(rest), EMOTIONS.index(emotion), **options)
        motion = model.denormalise(z)
        if k == 0:
            widest = int(motion[:, MOUTH].argmax())
        frame, = face.frames(face.source(), motion[widest:widest + 1])
        x, y = 220 * (k % 4), 250 * (k // 4)
        head = Image.fromarray(frame).crop(HEAD).resize((216, 216), Image.LANCZOS)
        image.paste(head, (x + 2, y + 30))
        label(image, emotion, x + 110, y + 15, 20)
    image.quantize(255).save(path, optimize=True)


# ------------------------------------------------------------------------------------- the keypoints
def keypoints_of_a_face(settings, path):
    """Eq. 3, term by term: 21 points at rest; turned; with an expression; scaled and moved."""
    turn = torch.zeros(M)
    turn[63], turn[67:] = 1, torch.tensor([-6.0, 16, 8])
    speak = turn.clone()
    speak[EXP] = torch.tensor(expression(aaa=90, smile=0.7))
    close = speak.clone()
    close[63], close[64], close[65] = 1.15, 0.1, 0.06
    rest = torch.zeros(M)
    rest[63] = 1
    steps = [
        (rest, "$x_c$: 21 points, the identity"),
        (turn, "$x_c R$: the head turns"),
        (speak, r"$x_c R + \delta$: the expression"),
        (close, r"$s(x_c R + \delta) + t$: nearer, moved")]
    figure, panels = plt.subplots(1, 4, figsize=(9.6, 3.4), layout="constrained")
    before = None
    for panel, (motion, title) in zip(panels, steps):
        face = Sketch()
        frame, = face.frames(face.source(), motion[None])
        panel.imshow(frame, extent=(-1, 1, 1, -1), alpha=0.45)
        points = keypoints(torch.tensor(FACE).float()[None], motion[None])[0]
        if before is not None:
            moved = points - before
            panel.quiver(*before[:, :2].T, *moved[:, :2].T, angles="xy", scale_units="xy", scale=1,
                         color=RED, width=0.008)
        panel.plot(*points[:, :2].T, "o", color=TEAL, markersize=4)
        panel.set_xlim(-0.7, 0.7)
        panel.set_ylim(1, -0.55)
        panel.set_title(title, fontsize=11)
        plain(panel)
        before = points
    figure.supxlabel("two points lie one behind the other, between the eyes; red: movement since "
                     "the picture before;\nin the third, only the lower lip moves more than a dot; "
                     "the drawn body stays where it is", fontsize=10, color=INK)
    save_figure(figure, path, 96)


# ------------------------------------------------------------------------------------------ the flow
def way_of(model, noise, times, **given):
    """Where noise (1, N, M) is at each of the times, and its end: (steps + 1, N, M)."""
    way = []

    def velocity(z, t):
        way.append(z)
        return guided_velocity(model, z, t, guidance=guidance_of(model.cfg), **given)
    end = euler(velocity, noise, times)
    return torch.cat([*way, end])


@torch.inference_mode()
def flow(settings, path, steps=10):
    """Noise becomes motion: the mouth of all frames at some times, and some frames at all times."""
    model, talker = MoDA.from_pretrained(settings.ckpt), ToyTalker("val", 1)
    motion, audio, identity = [torch.tensor(x) for x in talker.clips[0]]
    truth = model.normalise(motion)
    given = dict(audio=audio[None, 1:81], emotion=torch.tensor([talker.emotion[0]]),
                 identity=identity[None], prev=truth[:1])
    noise = torch.randn(1, 80, M, generator=torch.Generator().manual_seed(1))
    way = way_of(model, noise, euler_times(steps), **given)
    mouth = way[..., MOUTH].numpy()                # (steps + 1, frames)
    times = np.linspace(1, 0, steps + 1)
    figure = plt.figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    shown = 0, 2, 5, 8, 10
    for panel, k in zip(left.subplots(len(shown), sharex=True), shown):
        if k == steps:
            panel.plot(truth[1:81, MOUTH], color=GREY, linewidth=5, alpha=0.6)
        panel.plot(mouth[k], color=RED if k == steps else TEAL)
        panel.set_ylim(-3, 6)
        panel.set_yticks([])
        panel.set_ylabel(f"t = {times[k]:.1f}", rotation=0, ha="right", va="center")
    panel.set_xlabel("frame")
    left.suptitle("the mouth, equal scales (red: generated; grey: the truth)", fontsize=11)
    axes = right.subplots()
    for colour, frame in zip(NINE, range(4, 80, 9)):
        axes.plot(times, mouth[:, frame], "o-", color=colour, markersize=3)
        axes.plot([1, 0], mouth[[0, -1], frame], "--", color=colour, alpha=0.5)
    axes.legend(handles=[
        Line2D([], [], color=INK, marker="o", markersize=3, label="a frame's path, step by step"),
        Line2D([], [], color=INK, linestyle="--", alpha=0.5, label="straight line")])
    axes.set_xlim(1.03, -0.03)
    axes.set_xlabel("time t of the flow: ten Euler steps")
    axes.set_ylabel("the mouth, normalised")
    axes.set_title("nine of its frames on their way", fontsize=11)
    save_figure(figure, path)


@torch.inference_mode()
def straight(settings, path):
    """Two channels of some frames on their way from noise to motion: in the teacher's ten steps, in
    two of the teacher's, and in its student's two."""
    talker = ToyTalker("val", 1)
    motion, audio, identity = [torch.tensor(x) for x in talker.clips[0]]
    noise = torch.randn(1, 80, M, generator=torch.Generator().manual_seed(1))
    channels = {"the mouth": MOUTH, "the head's pitch": ROT.start}
    figure, panels = plt.subplots(len(channels), 3, figsize=(9.6, 5.4), sharex=True, sharey="row",
                                  layout="constrained")
    for column, (title, ckpt, steps) in enumerate([
            ("teacher: ten guided steps", settings.ckpt, 10),
            ("teacher: two guided steps", settings.ckpt, 2),
            ("student: two unguided steps", settings.student, 2)]):
        model = MoDA.from_pretrained(ckpt)
        given = dict(audio=audio[None, 1:81], emotion=torch.tensor([talker.emotion[0]]),
                     identity=identity[None], prev=model.normalise(motion[:1]))
        times = euler_times(steps, model.cfg.straight)
        way = way_of(model, noise, times, **given)
        if not column:
            ten = way
        for row, (name, channel) in enumerate(channels.items()):
            panel = panels[row, column]
            for colour, frame in zip(NINE, range(4, 80, 9)):
                panel.plot([*times, 0], way[:, frame, channel], "o-", color=colour, markersize=3)
                panel.plot(0, ten[-1, frame, channel], "o", color=colour, markersize=8,
                           markerfacecolor="none", clip_on=False)
            if not column:
                panel.set_ylabel(f"{name}, normalised")
        panels[0, column].set_title(title, fontsize=11)
        panel.set_xlim(1.03, -0.03)
        panel.set_xlabel("time t, from noise to motion")
    panels[0, 0].legend(handles=[
        Line2D([], [], color=INK, marker="o", markersize=3, label="a frame's path"),
        Line2D([], [], color=INK, marker="o", markersize=8, markerfacecolor="none", linestyle="",
               label="its end in ten steps")])
    save_figure(figure, path, 32)


# ------------------------------------------------------------------------------------- the attention
def attention_weights(model, audio, identity, emotion):
    """Softmax weights (H, queries, keys) of every block in the last Euler step."""
    seen = []
    attend = F.scaled_dot_product_attention

    def recorded(q, k, v):
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
        seen.append(weights[0])
        return attend(q, k, v)
    F.scaled_dot_product_attention = recorded
    model.cfg.chunk = len(audio)                   # so that it is not short
    try:
        generate(model, audio, identity, torch.zeros(M), emotion, steps=10, guidance={},
                 chunk=len(audio))
    finally:
        F.scaled_dot_product_attention = attend
    blocks = len(seen) // 10
    return seen[-blocks:]


def attention(settings, path):
    """What motion attends to in the last block, before and after training; prints the shares."""
    trained, talker = MoDA.from_pretrained(settings.ckpt), ToyTalker("val", 1)
    torch.manual_seed(1)
    fresh = MoDA(trained.cfg).eval()
    _, audio, identity = [torch.tensor(x) for x in talker.clips[0]]
    N = 80
    weights = {}
    for name, model in {"before": fresh, "after": trained}.items():
        blocks = attention_weights(model, audio[1:N + 1], identity, talker.emotion[0])
        weights[name] = blocks[-1][:, :N]                              # (H, N, 4 N)
    to_audio = weights["after"][:, :, N:2 * N]
    head = int(to_audio.diagonal(dim1=1, dim2=2).sum(-1).argmax())
    figure, panels = plt.subplots(2, figsize=(9.6, 5.4), layout="constrained")
    for panel, (name, all_heads) in zip(panels, weights.items()):
        part = all_heads[head]
        near = sum(part[:, N:2 * N].diagonal(offset=d).sum() for d in range(-2, 3))
        near = near / part[:, N:2 * N].sum()
        print(f"{name} training, head {head}: {near:.0%} of what motion gives to audio lies within "
              f"two frames of its own moment ({5 / N:.0%} if spread evenly)")
        panel.imshow(part.clamp(max=part.quantile(0.995)) ** 0.5, cmap="magma", aspect="auto",
                     interpolation="nearest")
        for k, modality in enumerate(("motion", "audio", "emotion", "identity")):
            share = part[:, k * N:(k + 1) * N].sum(-1).mean()
            panel.text((k + 0.5) * N, -3, f"{modality}: {share:.0%}", ha="center", fontsize=11)
            panel.axvline(k * N - 0.5, color="white")
        panel.set_ylabel(f"{name} training\nmotion frame", fontsize=11)
        panel.set_xticks(range(0, 4 * N, 20), [k % N for k in range(0, 4 * N, 20)], fontsize=8)
        panel.set_yticks([0, 40, 79])
    panels[1].set_xlabel("frame of the modality that is attended to (percent: its share of the "
                         "attention)\none head of the last block; brightness: square root of the "
                         "weight, before and after on separate scales")
    save_figure(figure, path, 48)


# ---------------------------------------------------------------------------------------- the claims
def measured(claim):
    """Rows "claim: variant" of the table of ablations -> {variant: {column: (mean, deviation)}}."""
    lines = Path(__file__).with_name("README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = next(row for row in cells if row[:2] == ["", "mouth corr"])
    rows = {}
    for name, *values in cells:
        if name.startswith(f"{claim}: "):
            numbers = [tuple(map(float, value.split(" ± "))) for value in values]
            rows[name.removeprefix(f"{claim}: ")] = dict(zip(header[1:], numbers))
    return rows


def claims(settings, path):
    """Steps against jerk; guidance and the sync loss against sync and the mouth. Means and
    deviations."""
    figure = plt.figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplot_mosaic([["left", "sync"], ["left", "error"]])
    left = panels["left"]
    curves(left, "Euler steps", ("jerk", RED))
    left.axhline(1, color=GREY, linestyle="--", label="the truth")
    left.set_title("in ten Euler steps heads shake no more than the truth", fontsize=11)
    left.set_xscale("log")
    left.set_xticks([1, 2, 5, 10, 20, 40], [1, 2, 5, 10, 20, 40])
    left.minorticks_off()
    left.set_ylabel("jerk of rotation, over the truth's")
    left.legend()
    gated = measured("sync loss")
    for name, column, title in (
            ("sync", "Sync-C", "Sync-C: guidance and ALSE raise it"),
            ("error", "mouth error", "mouth error: strong guidance raises it")):
        panel = panels[name]
        curves(panel, "audio guidance", (column, TEAL))
        for x, variant, fill, words in (
                (0.16, "without ALSE", "white", "by audio and emotion, without ALSE"),
                (0.24, "tau 0.4", RED, "likewise, with ALSE")):
            mean, deviation = gated[variant][column]
            panel.errorbar(x, mean, deviation, fmt="s", color=RED, markerfacecolor=fill, capsize=3,
                           label=words)
        panel.set_title(title, fontsize=11)
        panel.set_ylabel(column)
    panels["sync"].set_xticklabels([])
    panels["sync"].set_xlabel("")
    panels["error"].set_xlabel("guidance")
    curve = panels["sync"].legend(loc="lower right").get_texts()[0]
    curve.set_text("guidance by audio, without ALSE")
    figure.supxlabel("means of three trainings, 300 steps; "
                     "bars: one standard deviation, some smaller than the mark; "
                     "squares: guidance 0.2, drawn apart", fontsize=10, color=INK)
    save_figure(figure, path)


def curves(panel, claim, *columns):
    rows = measured(claim)
    x = [float(name) for name in rows]
    for column, colour in columns:
        mean, deviation = zip(*[row[column] for row in rows.values()])
        panel.errorbar(x, mean, deviation, fmt="o-", color=colour, label=column, capsize=3)
    panel.set_xlabel(claim)


# --------------------------------------------------------------------------------------- the network
BLUE, SAND, ROSE, GREEN = "#cfe3ea", "#f3d9b8", "#e8cfe0", "#d5e6c8"
INPUTS = [
    ("noisy chunk and\nframe before it", BLUE, "motion m"),
    ("voice, by HuBERT:\n12 layers x 768", SAND, "audio a"),
    ("one emotion of 8,\nfor all frames", ROSE, "emotion e"),
    ("21 keypoints,\nfor all frames", GREEN, "identity i")]


class Drawing:
    """Boxes and arrows on one canvas."""

    def __init__(self, width, height):
        self.figure, self.axes = plt.subplots(figsize=(width / 110, height / 110))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(self, x, y, width, height, colour, text, size=10):
        patch = plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK)
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, text, size)

    def text(self, x, y, text, size=10, **style):
        style = dict(ha="center", va="center") | style
        self.axes.text(x, y, text, fontsize=size, color="#202838", **style)

    def arrow(self, *places):
        """Along the corners (x, y)."""
        for start, end in zip(places[:-2], places[1:-1]):
            self.axes.plot(*zip(start, end), color=INK, linewidth=1)
        style = dict(arrowstyle="->", color=INK, shrinkA=0, shrinkB=0)
        self.axes.annotate("", places[-1], places[-2], arrowprops=style)


def network(settings, path):
    """The network from left to right; below it, the inside of a block."""
    d = Drawing(1056, 760)
    d.text(528, 18, "every token attends to all others; frame n of every modality is turned by the "
                    "same angle (aligned RoPE)", 11)
    for row, (text, colour, token) in enumerate(INPUTS):
        y = 44 + 66 * row
        d.box(10, y, 150, 50, colour, text)
        d.box(190, y, 96, 50, colour, token)
        d.box(330, y, 100, 50, colour, "own\nweights")
        d.arrow((160, y + 25), (190, y + 25))
        d.arrow((286, y + 25), (330, y + 25))
        d.arrow((430, y + 25), (444, y + 25))
        d.arrow((470, y + 25), (510, y + 25))
    d.box(510, 44, 110, 50, BLUE, "motion")
    d.box(510, 110, 110, 182, "#ecdccf", "audio,\nemotion,\nidentity\nas one\nstream")
    for y in 69, 200:
        d.arrow((620, y), (634, y))
    for x in 444, 634:
        d.box(x, 44, 26, 248, "#e3e1ea", "")
        d.text(x + 13, 168, "joint attention", rotation=90)
    d.box(710, 44, 160, 248, "#e3e1ea", "all four\nas one stream")
    d.box(920, 44, 126, 50, BLUE, "velocity\n70 per frame")
    d.arrow((660, 69), (710, 69))
    d.arrow((660, 200), (710, 200))
    d.arrow((870, 69), (920, 69))
    d.text(960, 120, "from the tokens\nof motion", 10)
    for x, text in ((395, "3 x four streams"), (585, "6 x two streams"),
                    (790, "12 x one stream")):
        d.text(x, 310, text, 11, weight="bold")
        d.arrow((x, 344), (x, 324))
    d.text(960, 310, "the paper's size;\nthe toy: 1, 1, 1", 10)
    d.box(330, 344, 540, 32, "#fdf3d0", "time t and emotion: shift, scale and gate of every block")

    d.text(528, 416, "inside a block of two or four streams (Fig. 4): each stream owns all but the "
                     "attention", 11, weight="bold")
    d.text(528, 712, "yellow: what time and emotion set", 10)
    for y, colour, name in ((450, BLUE, "motion"), (620, SAND, "each\nother\nstream")):
        d.text(42, y + 30, name, 11)
        d.arrow((75, y + 30), (110, y + 30))
        d.box(110, y, 92, 60, "#fdf3d0", "RMSNorm,\nshift, scale", 9)
        d.box(228, y, 100, 60, colour, "q, k, v (q, k:\nnorm, RoPE)", 9)
        d.box(560, y, 74, 60, colour, "linear", 9)
        d.box(654, y, 52, 60, "#fdf3d0", "gate", 9)
        d.text(740, y + 30, "+", 16)
        d.box(770, y, 92, 60, "#fdf3d0", "RMSNorm,\nshift, scale", 9)
        d.box(882, y, 58, 60, colour, "MLP", 9)
        d.box(960, y, 46, 60, "#fdf3d0", "gate", 9)
        d.text(1024, y + 30, "+", 16)
        for start, end in ((202, 228), (634, 654), (706, 732), (748, 770), (862, 882), (940, 960),
                           (1006, 1017)):
            d.arrow((start, y + 30), (end, y + 30))
        skip, back = (y - 12, y + 20) if y < 500 else (y + 72, y + 40)
        d.arrow((92, y + 30), (92, skip), (740, skip), (740, back))
        d.arrow((758, y + 30), (758, skip), (1024, skip), (1024, back))
        d.arrow((328, y + 30), (376, y + 30), (376, 544 if y < 500 else 586))
        d.arrow((508, 544 if y < 500 else 586), (508, y + 30), (560, y + 30))
    d.box(326, 544, 232, 42, "#e3e1ea", "one softmax over all tokens", 10)
    d.text(528, 740, "a single-stream block has one path for all tokens, with attention and MLP "
                     "side by side", 10)
    save_figure(d.figure, path, 32)


PICTURES = {
    "talk": (talk, "talk.gif"),
    "strip": (strip, "strip.png"),
    "emotions": (emotions, "emotions.png"),
    "keypoints": (keypoints_of_a_face, "keypoints.png"),
    "flow": (flow, "flow.png"),
    "straight": (straight, "straight.png"),
    "network": (network, "moda.png"),
    "attention": (attention, "attention.png"),
    "claims": (claims, "claims.png")}


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if settings.only and settings.only not in PICTURES:
        raise UsageError(f"--only={settings.only}: known are {', '.join(PICTURES)}")
    out = Path(settings.out)
    out.mkdir(exist_ok=True)
    for name in [settings.only] if settings.only else PICTURES:
        draw, file = PICTURES[name]
        draw(settings, out / file)
        print(f"{out / file}: {(out / file).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run(main)
