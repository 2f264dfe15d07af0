"""Make a face talk: voice, portrait and emotion in, video out.

    python sample.py --audio_path=voice.wav --emotion=happiness
    python sample.py --audio_path=voice.wav --weights=pretrained_weights --image_path=face.jpg
    arecord -t raw -f S16_LE -r 16000 -c 1 | python sample.py --stream --audio_path=- \\
        --output_path=- | ffplay -
    python sample.py --pairs=pairs.csv --output_path=FOLDER        a video for each row
    python sample.py --eval                      a table of metrics on toy clips the model never saw
    python sample.py --eval --data_dir=data/mine          or on the longest val clips of a data set

The video is as long as the voice: ceil(25 x seconds) frames. From top to bottom: settings, model,
face, then sound -> features -> motion -> frames -> video, each a generator; the live microphone;
evaluation. Flags:
"""
import signal

if __name__ == "__main__":                         # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import (BLOCK, CONTROLS, LABELS, MANNERS, RATE, SPAN, Clips, Sound, ToyTalker,
                  UsageError, appearing, check_effects, expression, feature_blocks, find_device,
                  parse_flags, read_rows, report, run, write_npy, write_video)
from moda import (ALSE, LIPS, MOUTH, ROT, SCALE, TRANS, MoDA, generate,
                  guidance_of, load_statistics, stream)
from renderer import (SIZE, LivePortrait, Sketch, crop_box, paste_back, read_image, read_motion,
                      relative, write_template)


@dataclass
class Settings:
    audio_path: str = ""         # sound, or a video's; -: 16 kHz PCM, 16 bits, mono, on stdin
    output_path: str = "out.mp4"  # .mp4 .m4v .mov .mkv .ts; -: an MPEG transport stream, on stdout
    pairs: str = ""              # csv, first line portrait,voice,emotion: a video each, to a folder
    image_path: str = ""         # the portrait
    crop: str = ""               # which square of it: x,y,size; else the largest in the centre
    weights: str = ""            # folder of LivePortrait's weights; else a drawn face
    paste_back: bool = False     # put the moving square back into the whole picture
    motion: str = ""             # relative (to the portrait's) or absolute; else as suits the model
    ckpt: str = "out/toy/ckpt.pt"  # MoDA's weights, ours or the released net-200.pth
    stats: str = "mean.pt"       # the statistics that belong to net-200.pth
    audio_encoder: str = ""      # wav2vec 2.0 or HuBERT, for models trained on it; else log-mel
    emotion: str = "none"        # a name; or in turn, for so many seconds: neutral:2.5,happiness
    seed: int = 1                # another seed, another head motion
    steps: int = 0               # of Euler; 0: 10, or 2 for a straight student
    # of the next five the checkpoint has defaults of its own, see moda.Config
    cfg_audio: float = 0.0       # guidance by audio (Eq. 8),
    cfg_emotion: float = 0.0     # by emotion,
    cfg_both: float = 0.0        # and by both dropped together
    chunk: int = 100             # frames sampled at once
    smooth: bool = False         # average the pose over three frames, twice
    overlap: int = 16            # frames of a chunk with which the next begins; they fade into it
    past: int = 0                # the first ones of these, which stay as they are
    save_motion: str = ""        # also write the motion, .npy or for LivePortrait .pkl
    motion_path: str = ""        # motion in such a file, in place of the model's
    stream: bool = False         # take a file in real time, like a microphone; print the delays
    # 0.4 takes a model that is quick enough: the toy with --steps=2, or its student; a turn of
    # --emotion that is no multiple of 0.2 s can add as much as 0.2 s
    latency: float = 0.0         # seconds, at most, from a sound to its motion: makes chunks short
    bf16: bool = False           # MoDA and LivePortrait in bfloat16
    compile: bool = False        # LivePortrait through torch.compile: worth its minute on a GPU
    eval: bool = False           # a table of metrics, on the CPU in float32, of 12 toy clips
    data_dir: str = ""           # or of the longest val clips of a data set
    alse: str = ""               # checkpoint of a lip-sync expert: two more metrics
    device: str = ""             # cuda if there is one


# what all of --pairs share
load_face = cache(LivePortrait)
load_features = cache(feature_blocks)
# flags that have an effect only with, or only without, another one
EFFECTS = {
    "with --weights": "crop paste_back compile",
    "with --eval": "alse data_dir",
    "without --audio_encoder": "latency",
    "without --motion_path": "audio_encoder emotion seed steps cfg_audio cfg_emotion cfg_both "
                             "chunk overlap past smooth latency stream",
    "without --latency": "chunk overlap past",
    "without --pairs": "audio_path image_path emotion save_motion",
    "without --eval": "audio_path output_path pairs image_path weights motion emotion "
                      "save_motion motion_path audio_encoder stream bf16 device"}


# --------------------------------------------------------------------------------- model and face
def open_model(settings, given):
    """The model of --ckpt, whose config says how to sample unless the flags do."""
    model = MoDA.from_pretrained(settings.ckpt)
    defaults = dict(vars(model.cfg))
    if settings.latency:
        defaults |= short_chunks(settings.latency)
    if model.cfg.rope_streams == 2:                # net-200.pth, which its authors render so
        defaults["motion"] = "absolute"
    # fields of Config that Settings has too; the others do no harm
    vars(settings).update(defaults | given)
    if model.cfg.straight and any(guidance_of(settings).values()):
        report(f"warning: {settings.ckpt} learned guided motion: more guidance exaggerates")
    if model.std.eq(1).all():
        load_statistics(model, settings.stats)
    elif "stats" in given:
        raise UsageError(f"--stats has no effect: {settings.ckpt} has statistics of its own")
    return model


def short_chunks(latency):
    """chunk, overlap and past that keep a latency in seconds.

    0.4 s make chunk=50, overlap=45, past=40; the next chunk begins 50 - 45 = BLOCK frames later:
        0 .. 39   keep the motion of the chunk before, as context (90 frames were little better)
        40 .. 44  go over from the chunk before (1, 0.8, .. 0.2 of it) to this one; are yielded
        45 .. 49  are sampled, but only the next chunk will yield them
    Sound comes in blocks of 5 frames. Of the five that are yielded, frame 40 waits longest: until
    41 .. 49 have come, 0.36 s, which leaves 0.04 s for the work."""
    new = round(25 * latency) // BLOCK * BLOCK     # rounded, for 25 * 4.6 is a little below 115
    if not 0.4 <= latency <= 40:
        raise UsageError(f"--latency={latency}: should be 0.4 to 40 seconds")
    return dict(chunk=40 + new, overlap=40 + BLOCK, past=40)


def open_face(settings, device):
    """The face to animate, its Source, and what puts its frames where they belong."""
    if not settings.weights:
        return Sketch(), Sketch().source(), iter   # which leaves them as they are
    # the whole picture; reduced in size only without a crop, which counts the file's pixels
    image = read_image(settings.image_path, settings.crop)
    x, y, size = box = crop_box(image, settings.crop)
    crop = image.resize((SIZE, SIZE), Image.LANCZOS, (x, y, x + size, y + size))
    dtype = torch.bfloat16 if settings.bf16 else None
    face = load_face(settings.weights, device, dtype, settings.compile)
    place = partial(paste_back, image=image, box=box) if settings.paste_back else iter
    return face, face.source(np.asarray(crop)), place


def sampling(settings):
    """What the settings say to moda.stream."""
    names = "seed steps chunk overlap past smooth".split()
    return {name: getattr(settings, name) for name in names} | {"guidance": guidance_of(settings)}


def emotions_in_turn(text):
    """neutral:2.5,happiness -> [(emotion, frames), ...] of moda.stream; of 2 s without a number;
    UsageError says what is wrong."""
    turns = []
    for word in text.split(","):
        name, _, seconds = word.strip().lower().partition(":")
        try:
            frames = 25 * float(seconds or 2)
        except ValueError:
            frames = 0
        if name not in LABELS or not 0 < frames < 1e6:
            raise UsageError(f"--emotion={text}: {word!r}? known are {', '.join(LABELS)}, with : "
                             "and seconds above 0, below 40000")
        turns.append((LABELS[name], frames))
    return turns


# --------------------------------------------------------------------- sound -> features -> motion
def motion_of(settings, model, source, features, saved, frames=None):
    """The voice's motion on this portrait, (n, 70) in LivePortrait units at a time.

    What was generated, or comes from --motion_path in its place, goes to the list `saved`; motion
    of a .npy file should have the voice's number of `frames`."""
    portrait = source.motion[0].to(model.mean.device)
    # Motion is generated as if the frame before were `neutral`; what is rendered is portrait +
    # motion - neutral (scales by their ratio, rotations by their product: renderer.relative).
    if settings.motion == "absolute":
        # Portrait and neutral cancel, and motion itself is rendered. It is generated, and saved,
        # for a face of mean size.
        neutral, size = portrait, model.size(portrait)
    else:
        # A face at rest in mean pose; what differs from it is added to the portrait.
        neutral, size = F.pad(model.mean[63:], (63, 0)), 1.0
    if settings.motion_path:
        motions = [read_motion(settings.motion_path, frames)]
        if settings.motion_path.endswith(".pkl") and settings.motion != "absolute":
            neutral = motions[0][0].to(portrait)   # as LivePortrait plays them
    else:
        zs = stream(model, chain.from_iterable(features), source.x_c,
                    model.normalise(neutral / size), emotions_in_turn(settings.emotion),
                    **sampling(settings))
        motions = (model.denormalise(z.to(portrait)) for z in zs)
    for motion in motions:
        if settings.save_motion:
            saved.append(motion.cpu())
        yield relative(motion.to(portrait) * size, portrait, neutral).cpu()


# ----------------------------------------------------------------------------------------- video
def make_video(settings, model):
    """From the voice to the file: each stage pulls from the one before it."""
    began = perf_counter()
    sound = Sound(settings.audio_path)
    face, source, place = open_face(settings, model.mean.device)
    spoken, times, saved = [], [], []              # filled by microphone, rendered and motion_of
    stdin = sound.path == "-"
    live = settings.stream or stdin
    # Sound from stdin goes two ways: to the features and, as a copy, through a pipe to the video;
    # an os.pipe has an end to read and one to write. From a file the video reads it by itself: if
    # that is played live, the copy goes nowhere.
    pipe, copy = os.pipe() if stdin else (None, os.devnull)
    pieces = microphone(sound, open(copy, "wb"), spoken) if live else sound
    features = load_features(settings.audio_encoder, model.mean.device)(pieces)
    motion = motion_of(settings, model, source, features, saved, sound.frames)
    if live:
        motion = ahead(motion)

    def rendered():
        for piece in motion:
            ready = perf_counter()
            for frame in face.frames(source, piece):
                times.append((ready, perf_counter()))                  # of its motion, of the frame
                yield frame
    bar = tqdm(place(rendered()), "frames", sound.frames)
    # files appear under their names when all has succeeded; "" is none
    with appearing(settings.output_path) as video, appearing(settings.save_motion) as kept:
        write_video(video, bar, sound, pipe)
        if saved:
            if kept.suffix == ".pkl":
                write_template(torch.cat(saved), kept)
            else:
                write_npy(saved, kept)
    taken = perf_counter() - began
    # `times` counts the frames, for a bar that is switched off, by TQDM_DISABLE, does not
    print(f"{settings.output_path}: {len(times)} frames in {taken:.2f} s, "
          f"{25 * taken / len(times):.3f} s per second of video")
    if live:
        # `spoken` holds each piece's time of arrival minus all seconds heard until then. Pieces
        # come late, never early, so the smallest is nearest to when the sound began.
        heard = min(spoken) + np.arange(1, len(times) + 1) / 25        # the end of each frame's
        # (3, 2): the three quantiles of the waits for motion and for frame
        waits = np.quantile(np.transpose(times) - heard, [0.5, 0.95, 1], axis=1)
        to_motion, to_frame = waits.T.round(2)
        print(f"median, 95 %, worst: sound to motion {to_motion} s, sound to frame {to_frame} s")


def make_videos(settings, model, given):
    """A video for each row of --pairs; those that are there stay, rows that fail are reported."""
    rows = read_rows(settings.pairs)
    os.makedirs(settings.output_path, exist_ok=True)
    for number, row in enumerate(rows, 1):
        video = f"{settings.output_path}/{number:03}.mp4"
        try:
            one = replace(settings, output_path=video, image_path=row["portrait"],
                          audio_path=row["voice"], emotion=row["emotion"])
            check(one, given)
            if not os.path.exists(video):
                make_video(one, model)
        except (KeyError, ValueError, OSError) as error:
            report(f"passed over: {settings.pairs}, row {number}: {error}")


def check(settings, given):
    """UsageError says which settings make no sense."""
    if bool(settings.weights) != bool(settings.image_path):
        raise UsageError("--weights and --image_path go together")
    emotions_in_turn(settings.emotion)
    voice = settings.audio_path
    stdin_allowed = not settings.motion_path and sys.platform != "win32"
    # the voice's file, without a span: voice.wav#t=2,5 are three seconds of it
    inputs = (SPAN.fullmatch(voice)[1], settings.image_path, settings.motion_path, settings.ckpt,
              settings.stats)
    if not voice or Path(inputs[0]).is_fifo() or voice == "-" and not stdin_allowed:
        raise UsageError(f"--audio_path={voice}: which voice? a file, no pipe; or - for stdin, but "
                         "not with --motion_path, nor on Windows")
    for flag, endings in ("output_path", "- .mp4 .m4v .mov .mkv .ts"), ("save_motion", ".npy .pkl"):
        name = getattr(settings, flag)
        path = Path(name)
        known = (path.suffix or name) in endings.split() and not path.is_dir()
        if flag in given and not (known and path.parent.is_dir()):
            raise UsageError(f"--{flag}={name}: should be a file in an existing folder, and one of "
                             f"{endings}")
        for one in filter(os.path.exists, inputs):
            if path.is_file() and path.samefile(one):
                raise UsageError(f"{one} would be written over, as {path}")


def main(argv):
    settings = Settings()
    given = parse_flags(argv, __doc__, settings)
    if settings.output_path == "-":
        sys.stdout = sys.stderr                    # stdout is for the video
    check_effects(given, settings, EFFECTS)
    if settings.pairs and "output_path" not in given:
        raise UsageError("--pairs: into which folder? --output_path=FOLDER")
    if settings.motion not in ("", "relative", "absolute"):
        raise UsageError(f"--motion={settings.motion}: should be relative or absolute")
    if not settings.pairs and not settings.eval:
        check(settings, given)
    model = open_model(settings, given)
    if settings.eval:
        clips = partial(Clips, settings.data_dir) if settings.data_dir else ToyTalker
        return evaluate(settings, model, clips("val"), clips("train"))
    model.to(find_device(settings.device))
    if settings.bf16:
        for p in model.parameters():               # the statistics stay float32
            p.data = p.data.bfloat16()
    if settings.pairs:
        return make_videos(settings, model, given)
    make_video(settings, model)


# ------------------------------------------------------------------------------ the live microphone
def microphone(sound, copy, spoken):
    """Sound as it comes, a file's in real time; it is also written to the open file `copy`.

    With every piece its time of arrival, minus the seconds heard so far, goes to the list `spoken`.
    """
    writer = ThreadPoolExecutor(1)                 # for the pipe may be full
    began = perf_counter()
    heard = 0.0
    for piece in sound:
        heard += len(piece) / RATE
        if sound.path != "-":
            sleep(max(0, began + heard - perf_counter()))
        spoken.append(perf_counter() - heard)
        writer.submit(copy.write, piece.tobytes())
        yield piece
    writer.submit(copy.close)


def ahead(motion):
    """Pass motion on while a thread generates the next piece."""
    thread = ThreadPoolExecutor(1)                 # no "with", which waits: stdin may be silent
    coming = thread.submit(next, motion, None)
    while (piece := coming.result()) is not None:
        coming = thread.submit(next, motion, None)
        yield piece


# --------------------------------------------------------------------------------------- evaluation
def beginnings(data, count, model):
    """How the K longest clips begin, all cut to one length, 7.4 seconds at most: normalised motion
    (K, T, 70), audio (K, T, L, A), identity (K, 63), the motion before (K, 70), emotion (K,)."""
    longest = np.argsort(-data.lengths, kind="stable")[:count]
    # 184 frames are two chunks of 100 that share 16; one more is the frame before
    frames = min(185, *data.lengths[longest]) - 1
    # for each clip a row of window numbers to try in turn, here only its first one; the list takes
    # complaints about windows that cannot be read
    batch = data.windows(data.first[longest, None], [], frames)
    z, prev = model.normalise(batch["motion"]), model.normalise(batch["prev"])
    return z, batch["audio"].float(), batch["identity"], prev, batch["emotion"]


def seven_frames(audio):
    """Features (K, T, L, A) of each frame and three on either side, a mean over layers, with a
    channel of ones as bias: (K, T, 7 A + 7). Frames beyond the ends are ones too."""
    padded = F.pad(audio.mean(2), (0, 1, 3, 3), value=1)
    return padded.unfold(1, 7, 1).flatten(2)


def linear_baseline(model, training, audio):
    """What ridge regression, in closed form, on 60 training clips makes of audio (K, T, L, A)."""
    z, heard, *_ = beginnings(training, 60, model)
    x = seven_frames(heard).flatten(0, 1)
    gram = x.T @ x + 100 * torch.eye(x.size(1))
    return seven_frames(audio) @ torch.linalg.solve(gram, x.T @ z.flatten(0, 1))


# metric: (channels, how often they are differenced over time). It is a ratio: the mean absolute
# value of ours over that of the truth.
SIZES = {
    "head motion": (ROT, 0),
    "jerk, lips": (LIPS, 3),
    "jerk, rotation": (ROT, 3),
    "jerk, translation": (TRANS, 3),
    "jerk, scale": (SCALE, 3)}


def compare(z, truth, std):
    """Metrics of normalised motion beside the true one, (K, T, 70); std (70,): what a normalised 1
    is in LivePortrait's units.

    Correlation, error and opening (the slope of ours over the true mouth) are of each clip's mouth;
    the others of all clips together."""
    both = torch.stack([truth, z]).double()                            # (2, K, T, 70)
    centred = both - both.mean(2, keepdim=True)
    true, ours = centred[..., MOUTH]
    corr = F.cosine_similarity(true, ours)
    slope = corr * ours.std(1) / true.std(1)
    error = both[..., MOUTH].diff(dim=0).square().mean(2) / true.var(1)
    row = {"mouth corr": corr.mean(), "mouth error": error.mean()}
    row["opening, least"], row["opening, most"] = slope.aminmax()
    for name, (channels, order) in SIZES.items():
        moved = centred.diff(order, dim=2) * std
        true, ours = moved[..., channels].abs().mean((1, 2, 3))
        row[name] = ours / true
    # how far two heads turn apart, in normalised units; of two seeds, a measure of diversity
    row["heads apart"] = both[..., ROT].diff(dim=0).std()
    frames = torch.cat([both[:, :, 1:], both.diff(dim=2)], -1)         # (2, K, T - 1, 140)
    row["Frechet"] = frechet(*frames.flatten(1, 2))
    return row


def frechet(x, y):
    """Squared Frechet distance of two normal distributions fitted to samples (n, D)."""
    a, b = x.T.cov(), y.T.cov()
    shift = x.mean(0) - y.mean(0)
    common = torch.linalg.eigvals(a @ b).sqrt().real
    return (shift @ shift + (a + b).trace() - 2 * common.sum()).abs()


def sync_scores(expert, audio, motion):
    """SyncNet's protocol on motion, for K clips: the mean distance at each of the offsets -15..15.

    Sync-D is the best of them; Sync-C, the confidence, how far their median lies above it."""
    a, m = expert(audio, motion)
    middle = a[:, None, 15:-15].mT                 # of the voice, (K, 1, D, n)
    shifted = m.unfold(1, middle.size(3), 1)       # (K, 31, D, n)
    distances = (shifted - middle).norm(dim=2).mean(-1)
    best = distances.amin(1)
    confidence = distances.median(1).values - best
    return {"Sync-C": confidence.mean(), "Sync-D": best.mean()}


def emotion_accuracy(motion, emotion):
    """How often the face, without its lips, is nearest to the right one of eight."""
    still = np.setdiff1d(range(63), LIPS)
    # MANNERS[name]: how far each of the 8 emotions moves the control `name`, (8,). All controls
    # make 8 faces, (8, 63).
    held = {name: MANNERS[name] for name in CONTROLS}
    prototypes = motion.new_tensor(expression(**held))
    distance = torch.cdist(motion[..., still].mean(1), prototypes[:, still])
    return (distance.argmin(1) == emotion).float().mean()


@torch.inference_mode()
def evaluate(settings, model, data, training):
    """Print and return a table {column: {metric: x}} on clips of `data`.

    Columns, compared with the truth:
        truth        itself
        model        what the model makes of each clip
        other voice  what it makes of another clip's voice, from a face at rest, with emotion k mod
                     8 for clip k: the emotion should be right, but mouth corr and Sync-C, which the
                     expert judges by the clip's own voice, near 0
        linear       a linear model of `training` clips
    and compared with the model:
        other seed   the model once more, from other noise"""
    truth, *given = beginnings(data, 12, model)
    audio, identity, prev, emotion = given
    in_turn = torch.arange(len(audio)) % 8
    rest = model.normalise(F.pad(model.mean[63:], (63, 0))).expand_as(prev)
    expert = settings.alse and ALSE.from_pretrained(settings.alse)
    foreign = audio.roll((1, 50), (0, 1))          # in time as well: there may be a single clip

    def speak(*given, **other):
        clips = tqdm([*zip(*given)], "evaluating", leave=False)
        options = sampling(settings) | other
        return torch.stack([generate(model, *clip, **options) for clip in clips])

    def judge(z, reference, label):
        motion = model.denormalise(z)
        row = compare(z, reference, model.std)
        if expert:
            row |= sync_scores(expert, audio, motion)
        if isinstance(data, ToyTalker):
            row["emotion"] = emotion_accuracy(motion, label)
        return row
    ours = speak(*given)
    table = {
        "truth": judge(truth, truth, emotion),
        "model": judge(ours, truth, emotion),
        "other voice": judge(speak(foreign, identity, rest, in_turn), truth, in_turn),
        "linear": judge(linear_baseline(model, training, audio), truth, emotion),
        "other seed": judge(speak(*given, seed=settings.seed + 1), ours, emotion)}
    print(f"{'':17}", *[f"{name:>14}" for name in table])
    for metric in table["truth"]:
        print(f"{metric:17}", *[f"{row[metric]:14.3}" for row in table.values()])
    return table


if __name__ == "__main__":
    run(main)
