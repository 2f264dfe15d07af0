"""MoDA motion generator: audio, emotion and identity in, 70 motion numbers per frame out.

Sections, equations and figures refer to arXiv 2507.03256. From top to bottom: settings, rotary
positions, the blocks, the network with its three fusion stages, the losses, the lip-sync expert,
the sampler, faster sampling, checkpoints.
Letters: B clips, N frames at 25 fps, n tokens of a stream, D width, H heads of d channels,
L x A audio layers x channels, M = 70 motion numbers.
"""
import copy
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

M = 70                           # motion numbers per frame, in the released order:
EXP = slice(0, 63)               # expression, 21 points x 3
SCALE = slice(63, 64)
TRANS = slice(64, 67)            # translation
ROT = slice(67, 70)              # pitch, yaw, roll in degrees
MOUTH = 58                       # y of point 19, the lower lip: moves most in speech
# lips, corners of the mouth, chin, the skin below the nose: see renderer.POINTS
LIPS = [3 * point + axis for point in (6, 12, 14, 17, 19, 20) for axis in range(3)]
EMOTIONS = "anger contempt disgust fear happiness neutral sadness surprise none".split()
NO_EMOTION = 8                   # the null label of classifier-free guidance


@dataclass
class Config:
    width: int = 768             # of a token
    heads: int = 12              # of attention
    n_four: int = 3              # four-stream blocks (Sec. 4.1.2); 21, 0, 0 is Table 3's "w/o C2F"
    n_two: int = 6               # two-stream blocks
    n_one: int = 12              # single-stream blocks
    rope_streams: int = 4        # rotated in the four-stream stage: 4, or 2 in the released model
    audio_layers: int = 12       # 12 x 768 for wav2vec 2.0 / HuBERT base, 1 x A for log-mel
    audio_dim: int = 768         # channels of a layer
    p_drop_audio: float = 0.5    # condition dropout in training (Sec. 4.1.2), for guidance (Eq. 8)
    p_drop_emotion: float = 0.1  # the same for emotion
    focus: float = 1.0           # our weight of lips and head in Eq. 4 and 5; other channels: 1
    # how it is sampled, unless sample.py is given something else
    cfg_audio: float = 0.0       # guidance by audio (Eq. 8),
    cfg_emotion: float = 0.0     # by emotion,
    cfg_both: float = 0.2        # and by both dropped together
    # more than sample.py's --overlap, 16; in shorter ones attention is made less sharp
    chunk: int = 100             # frames sampled at once
    smooth: bool = False         # average the pose over three frames, twice
    straight: bool = False       # a student of train.py --reflow: sampled in two steps


TOY = dict(width=128, heads=2, n_four=1, n_two=1, n_one=1,
           audio_layers=1, audio_dim=160, p_drop_audio=0.1,
           focus=4.0, smooth=True)
PRESETS = {"moda": {}, "toy": TOY}
# What train.py --reflow changes in the teacher's Config for the student: guidance is already in the
# motion that it learns from, so no condition is dropped in training or guides in sampling.
STRAIGHT = dict(straight=True) | dict.fromkeys(
    "p_drop_audio p_drop_emotion cfg_audio cfg_emotion cfg_both".split(), 0.0)


# ----------------------------------------------------------------------------- positions and times
def waves(position, d, theta):
    """cos + i sin of the angles position (...) * theta^(-2k / d), for k < d / 2: (..., d / 2)."""
    k = torch.arange(d // 2, device=position.device)
    frequency = torch.exp(-math.log(theta) * 2 * k / d)
    angles = position[..., None] * frequency
    return torch.complex(angles.cos(), angles.sin())


def rope_table(n, d, device=None):
    """RoPE's (Sec. 3.2.2) waves for n positions and d channels: (n, d / 2)."""
    return waves(torch.arange(n, device=device), d, theta=256)         # windows are short


def rotate(x, rope):
    """Turn the channel pairs (2i, 2i + 1) of x (B, H, k N, d) by the angles of N positions: each
    pair is a complex number, multiplied by cos + i sin.

    Aligned RoPE: each of the k modalities in x counts its frames from 0 again."""
    pairs = x.float().unflatten(3, (-1, 2)).unflatten(2, (-1, len(rope)))
    turned = torch.view_as_complex(pairs) * rope                       # (B, H, k, N, d / 2)
    return torch.view_as_real(turned).view(x.shape).type_as(x)


def timestep_embedding(t):
    """t (...) in [0, 1] -> (..., 256), cosines first."""
    # (..., 128, 2) -> (..., 2, 128) -> (..., 256)
    return torch.view_as_real(waves(1000 * t, 256, 10000)).mT.flatten(-2)


# ------------------------------------------------------------------------ motion transformer blocks
def modulate(x, shift, scale):
    """AdaLN, with RMSNorm in place of LayerNorm, as in the released network."""
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale) + shift


def attention(q, k, v):
    """One softmax over all tokens: (B, H, n, d) -> (B, n, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Heads(nn.Module):
    """(B, n, 3D) -> q, k, v (B, H, n, d); q and k are normalised and, most often, rotated."""

    def __init__(self, cfg, rotated=True):
        super().__init__()
        self.d = cfg.width // cfg.heads
        self.rotated = rotated
        self.q_norm = nn.RMSNorm(self.d, eps=1e-5)
        self.k_norm = nn.RMSNorm(self.d, eps=1e-5)

    def forward(self, qkv, rope):
        q, k, v = qkv.unflatten(-1, (3, -1, self.d)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v


class ModalityPath(nn.Module):
    """What one stream owns in a block (Sec. 3.2.2, Fig. 4): AdaLN, projections, feed-forward."""

    def __init__(self, cfg, rotated):
        super().__init__()
        D = cfg.width
        self.adaln = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.heads = Heads(cfg, rotated)
        self.proj = nn.Linear(D, D)
        self.mlp_in = nn.Linear(D, 4 * D)
        self.mlp_out = nn.Linear(4 * D, D)

    def before_attention(self, x, c, rope):
        """q, k, v of x (B, n, D), and what AdaLN says to the rest of the block."""
        shift, scale, *rest = self.adaln(c).chunk(6, -1)               # (B, 1, D) each
        qkv = self.qkv(modulate(x, shift, scale))
        return self.heads(qkv, rope), rest

    def after_attention(self, x, y, gate, mlp_shift, mlp_scale, mlp_gate):
        x = x + gate * self.proj(y)
        h = self.mlp_in(modulate(x, mlp_shift, mlp_scale))
        return x + mlp_gate * self.mlp_out(F.gelu(h, approximate="tanh"))


class JointBlock(nn.Module):
    """Joint attention over any number of streams, each with its own path (Sec. 3.2.2, Fig. 4)."""

    def __init__(self, cfg, n_paths, n_rotated):
        super().__init__()
        self.paths = nn.ModuleList(ModalityPath(cfg, s < n_rotated) for s in range(n_paths))

    def forward(self, xs, c, rope):
        """Streams xs, (B, n, D) each, under the conditioning vector c (B, 1, D) -> the same."""
        before = [path.before_attention(x, c, rope) for path, x in zip(self.paths, xs)]
        qkvs, modulations = zip(*before)                               # a tuple per stream
        # zip: (q, k, v) of each stream -> all q, all k, all v; they are joined along the tokens
        q, k, v = [torch.cat(parts, 2) for parts in zip(*qkvs)]
        y = attention(q, k, v)
        ys = y.split([x.size(1) for x in xs], 1)                       # back to their streams
        out = []
        for path, x, y, modulation in zip(self.paths, xs, ys, modulations):
            out.append(path.after_attention(x, y, *modulation))
        return out


class SingleBlock(nn.Module):
    """One stream for all tokens; attention and feed-forward run in parallel, sharing layers."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.adaln = nn.Linear(D, 3 * D)
        self.qkv_mlp = nn.Linear(D, 7 * D)
        self.heads = Heads(cfg)
        self.out = nn.Linear(5 * D, D)

    def forward(self, x, c, rope):
        """x (B, 4N, D) -> the same."""
        D = x.size(-1)
        shift, scale, gate = self.adaln(c).chunk(3, -1)
        x_ = modulate(x, shift, scale)
        qkv, h = self.qkv_mlp(x_).split([3 * D, 4 * D], -1)
        q, k, v = self.heads(qkv, rope)
        y = attention(q, k, v)
        h = F.gelu(h, approximate="tanh")
        return x + gate * self.out(torch.cat([y, h], -1))


class Head(nn.Module):
    """From motion tokens to velocities, (B, N, D) -> (B, N, M)."""

    def __init__(self, cfg):
        super().__init__()
        self.adaln = nn.Linear(cfg.width, 2 * cfg.width)
        self.linear = nn.Linear(cfg.width, M)

    def forward(self, x, c):
        shift, scale = self.adaln(c).chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


def init_weights(model):
    """Xavier-uniform weights and zero biases. AdaLN begins at zero, so that a block adds nothing;
    attention begins on each frame's own moment."""
    for name, layer in model.named_modules():
        # the head keeps PyTorch's own, as in the authors' code
        if isinstance(layer, nn.Linear) and name != "head.linear":
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if name.endswith("adaln"):
            nn.init.zeros_(layer.weight)
        # Not in the paper: with equal biases in every q and k, turned by RoPE, their product is
        # largest at the same position. So each frame attends to its own moment in every rotated
        # stream from the first step on, which a short training needs.
        if name.endswith(("qkv", "qkv_mlp")):
            nn.init.ones_(layer.bias[:2 * layer.in_features])


# ------------------------------------------------------------------------------------- the network
class MotionModel(nn.Module):
    """What MoDA and ALSE share: a config, statistics of the motion they learned from, loading."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(M))
        self.register_buffer("std", torch.ones(M))
        weight = torch.ones(M)
        weight[LIPS] = weight[SCALE.start:] = cfg.focus
        self.register_buffer("weight", weight, persistent=False)       # of channels in the losses

    def size(self, portrait):
        """How large a face is, from the portrait's 70 numbers: a factor for each of these, for
        scale and for translation, which grows with it, the scale over the mean scale, else 1.

        The network should see faces of mean size. Where its output takes the place of the
        portrait's numbers (sample.py --motion=absolute), motion = size * network(prev / size)."""
        factors = torch.ones_like(portrait)
        ratio = (portrait[..., SCALE] + 1e-5) / (self.mean[SCALE] + 1e-5)
        factors[..., SCALE.start:TRANS.stop] = ratio
        return factors

    def normalise(self, motion):
        """(..., 70) in LivePortrait units -> the network's."""
        return (motion - self.mean) / (self.std + 1e-5)                # some never move: std 0

    def denormalise(self, z):
        return z * (self.std + 1e-5) + self.mean

    def flat_audio(self, audio):
        """(B, N, L, A) -> (B, N, L * A); ValueError if those are not the model's features."""
        expected = self.cfg.audio_layers, self.cfg.audio_dim
        found = tuple(audio.shape[2:])
        if found != expected:
            raise ValueError(f"the model takes {expected} features per frame, not {found}: name "
                             "the audio encoder or the data set that it learned from")
        return audio.flatten(2)

    @classmethod
    def from_pretrained(cls, path, state=None, **changes):
        """Load a checkpoint of ours, or the released net-200.pth, ready for inference.

        state: what the file holds, if it was read already; changes: of its Config. ValueError says
        what does not fit."""
        state = state or read_checkpoint(path)
        with explained(f"{path}: not a {cls.__name__} that this version knows; get or retrain it"):
            # a name in the released file, see RELEASED
            if cls is MoDA and any("motion_embedder.mlp" in key for key in state):
                return from_released(state, path, **changes).eval()
            if state.get("kind") != cls.__name__:
                raise ValueError(f"it holds {state.get('kind', 'nothing')}")
            model = cls(Config(**state["config"] | changes))
            # state_dict holds the model's own tensors: to copy into them loads it
            load_strictly(model.state_dict(), state.get("ema") or state["model"])
        return model.eval()


def embedder(n_in, D):
    return nn.Sequential(nn.Linear(n_in, D), nn.SiLU(), nn.Linear(D, D))


class MoDA(MotionModel):
    """The motion generation network (Fig. 3): the velocity of noisy motion under conditions."""

    def __init__(self, cfg):
        super().__init__(cfg)
        D = cfg.width
        if D % (2 * cfg.heads):
            raise ValueError(f"width {D} should be an even multiple of heads {cfg.heads}")
        self.motion_embedder = embedder(2 * M, D)
        self.audio_embedder = nn.Sequential(
            nn.Linear(cfg.audio_layers * cfg.audio_dim, D),
            nn.ReLU(),
            nn.Linear(D, D),
            nn.ReLU(),
            nn.Linear(D, D),
            nn.RMSNorm(D, eps=1e-6))
        self.emotion_embedder = nn.Embedding(len(EMOTIONS), D)
        self.identity_embedder = embedder(63, D)
        self.time_embedder = embedder(256, D)
        self.null_audio = nn.Parameter(torch.randn(cfg.audio_dim))     # in place of audio
        self.register_buffer("x_c_mean", torch.zeros(63))              # of the training faces
        self.register_buffer("x_c_std", torch.ones(63))
        self.four = nn.ModuleList(JointBlock(cfg, 4, cfg.rope_streams) for _ in range(cfg.n_four))
        self.two = nn.ModuleList(JointBlock(cfg, 2, 2) for _ in range(cfg.n_two))
        self.one = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.n_one))
        self.head = Head(cfg)
        init_weights(self)

    def forward(self, z, t, audio, emotion, identity, prev, drop_audio=None):
        """Velocity, estimating eps - z0, of normalised noisy motion.

        z (B, N, 70); t (B,) in [0, 1], 1 = noise; audio (B, N, L, A); emotion (B,) 0..8; identity
        (B, 63); prev (B, 70), the frame before the window, normalised (Sec. 3.2.1, which takes the
        clip's first); drop_audio (B,) bool -> (B, N, 70)."""
        N = z.size(1)
        prev = prev[:, None].expand_as(z)
        # one token per frame and modality (Sec. 3.2.1)
        m = self.motion_embedder(torch.cat([prev, z], -1))             # (B, N, D)
        # under CUDA's autocast m is bfloat16, but what comes from a norm float32
        a = self.embed_audio(audio, drop_audio).type_as(m)
        e = self.emotion_embedder(emotion)[:, None].expand_as(m).type_as(m)
        # standardised, for faces differ by a small part of their size
        x_c = (identity - self.x_c_mean) / self.x_c_std.clamp(min=0.01)
        i = self.identity_embedder(x_c.type_as(m))[:, None].expand_as(m)
        c = self.conditioning(t, emotion)
        rope = rope_table(N, self.cfg.width // self.cfg.heads, z.device)
        # coarse to fine (Sec. 3.2.3): four streams, then motion and its conditions, then one
        for block in self.four:
            m, a, e, i = block([m, a, e, i], c, rope)
        cond = torch.cat([a, e, i], 1)                                 # (B, 3N, D)
        for block in self.two:
            m, cond = block([m, cond], c, rope)
        x = torch.cat([m, cond], 1)                                    # (B, 4N, D)
        for block in self.one:
            x = block(x, c, rope)
        return self.head(x[:, :N], c)

    def embed_audio(self, audio, drop_audio):
        """(B, N, L, A) -> (B, N, D); where drop_audio (B,), if any, all is the null vector."""
        audio = self.flat_audio(audio)
        if drop_audio is not None:
            null = self.null_audio.repeat(self.cfg.audio_layers)       # every layer's is the same
            # a data set's audio is float16; here it becomes float32, as the null vector is
            audio = torch.where(drop_audio[:, None, None], null, audio)
        return self.audio_embedder(audio)

    def conditioning(self, t, emotion):
        """What every AdaLN is conditioned on (Sec. 3.2.1): t (B,), emotion (B,) -> (B, 1, D)."""
        time = timestep_embedding(t).to(self.null_audio)               # type, device of weights
        return F.silu(self.time_embedder(time) + self.emotion_embedder(emotion))[:, None]


# -------------------------------------------------------------------------------------- the losses
def draw(cfg, B, N, generator):
    """What a training step draws: times, noise, dropped conditions; on the CPU, for any device."""
    return dict(
        t=torch.rand(B, generator=generator),
        eps=torch.randn(B, N, M, generator=generator),
        drop_audio=torch.rand(B, generator=generator) < cfg.p_drop_audio,
        drop_emotion=torch.rand(B, generator=generator) < cfg.p_drop_emotion)


def losses(model, z0, audio, emotion, identity, prev, t, eps, drop_audio, drop_emotion,
           weight=1.0, expert=None, tau=0.4):
    """L_RF, L_vel and the gated L_ALSE, whose sum is Eq. 6; and, to be logged, the lips' own error,
    unweighted.

    z0 (B, N, 70), normalised; t .. drop_emotion from `draw`; weight (70,) of the channels; expert:
    (audio, z0) -> a, m of ALSE."""
    emotion = torch.where(drop_emotion, NO_EMOTION, emotion)
    t_ = t[:, None, None]
    z_t = (1 - t_) * z0 + t_ * eps                                     # Sec. 3.1: a straight path,
    x = eps - z0                                                       # and its velocity
    m = model(z_t, t, audio, emotion, identity, prev, drop_audio)      # v_theta, called m in Eq. 5
    error = (x - m) * weight ** 0.5
    loss_rf = error.square().mean()                                    # Eq. 4
    loss_vel = error.diff(dim=1).square().mean()                       # Eq. 5: x' - m',
    loss_vel += error.diff(2, dim=1).square().mean()                   # and x'' - m''
    lips = F.mse_loss(m[..., LIPS], x[..., LIPS]).detach()
    loss_sync = 0 * loss_rf                        # a zero of its type, where there is no expert
    if expert:
        sync = sync_loss(*expert(audio, z_t - t_ * m))                 # of the estimate of z0
        gate = (sync < tau) & ~drop_audio                              # Eq. 7; a dropped voice has
        loss_sync = (sync * gate).mean()                               # nothing to be in sync with
    return loss_rf, loss_vel, loss_sync, lips


@torch.no_grad()
def reflow(teacher, student, batch):
    """A batch for `losses` whose z0 is what the teacher, with its guidance, makes of eps.

    Minimising |(eps - z0) - v((1 - t) z0 + t eps, t)|^2 over such pairs makes paths straight: fewer
    steps, without guidance, reach the same ends (arXiv 2209.03003, Sec. 2.2). Half of the pairs are
    learned at t = 1, where a single step goes all the way. A second step begins where the student's
    own first one led, a little beside the line. So for t below 1 the line from that place to z0 is
    learned, and eps moved to where this line begins: the second step then mends what the first did
    wrong (not in that paper; DAgger, arXiv 1011.0686, learns from its own places, too)."""
    # without drop_audio and drop_emotion, which are all False: a student's p_drop is 0
    conditions = {name: batch[name] for name in "audio emotion identity prev".split()}
    eps = batch["eps"]

    def end(model, steps):
        velocity = partial(guided_velocity, model, guidance=guidance_of(model.cfg), **conditions)
        return euler(velocity, eps, euler_times(steps, model.cfg.straight))
    z0 = end(teacher, 0)                           # in its usual steps
    missed = end(student, 1) - z0
    t = (2 * batch["t"]).clamp(0.2, 1)
    # At t the student is (1 - t) missed beside the line from eps to z0. Its own line, from z0
    # through that place, is 1 / t as far away at t = 1: without bound for t near 0, so t >= 0.2.
    return batch | dict(z0=z0, t=t, eps=eps + (1 / t - 1)[:, None, None] * missed)


def sync_loss(a, m, in_sync=True):
    """Cross-entropy of the cosine of ALSE's a and m, (B, N, D) each, a mean over frames: (B,)."""
    p = (a.float() * m).sum(-1).clamp(1e-4, 1 - 1e-4)                  # float: bfloat16 rounds to 1
    if not in_sync:
        p = 1 - p
    return -p.log().mean(1)


class ResidualConv(nn.Conv1d):
    """x + convolution over time of GELU(RMSNorm(x)); x (B, N, D)."""

    def forward(self, x):
        h = F.gelu(F.rms_norm(x, x.shape[-1:]))
        return x + super().forward(h.mT).mT


class ALSE(MotionModel):
    """Adaptive Lip-motion Synchronization Expert (Sec. 3.2.4): do voice and lips belong together?

    The paper's supplement is not public; its text and SyncNet support this reading. Two towers, of
    audio and lip motion, give a unit vector per frame each, whose cosine is trained to be the
    probability of sync, against shifted and foreign pairs."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.audio = self.tower(cfg.audio_layers * cfg.audio_dim)
        self.motion = self.tower(len(LIPS))
        init_weights(self)

    def tower(self, n_in):
        D = self.cfg.width
        layers = [ResidualConv(D, D, kernel_size=5, padding="same") for _ in range(4)]
        return nn.Sequential(nn.Linear(n_in, D), *layers, nn.ReLU())

    def forward(self, audio, motion):
        """audio (B, N, L, A), motion (B, N, 70) in LivePortrait units -> unit vectors a and m,
        (B, N, D) each, without negative numbers, so that a cosine is a probability."""
        a = self.audio(self.flat_audio(audio).float())
        m = self.motion(self.normalise(motion)[..., LIPS])
        return F.normalize(a, dim=-1), F.normalize(m, dim=-1)

    def pretraining_loss(self, audio, motion, shift):
        """In sync: a clip as recorded. Not: its voice `shift` frames late, and another's voice."""
        a, m = self(audio, motion)
        late = sync_loss(a.roll(shift, 1), m, in_sync=False)
        foreign = sync_loss(a.roll(1, 0), m, in_sync=False)
        return (sync_loss(a, m) + (late + foreign) / 2).mean()


# ------------------------------------------------------------------------------------- the sampler
def guidance_of(settings):
    """A sampler's settings, or a Config, as {condition: lambda} of Eq. 8."""
    return {"audio": settings.cfg_audio, "emotion": settings.cfg_emotion,
            "audio+emotion": settings.cfg_both}


def guided_velocity(model, z, t, audio, emotion, identity, prev, guidance):
    """Eq. 8: (1 + sum of lambda_c) v - sum over conditions c of lambda_c v with c dropped.

    guidance {c: lambda_c}, "audio+emotion" for both together; t (), the rest as in MoDA.forward
    -> (B, N, 70). All passes are one batch."""
    weights = {"": 1 + sum(guidance.values())}     # of passes; "" drops nothing
    for condition, scale in guidance.items():
        if scale:
            weights[condition] = -scale
    n, B = len(weights), len(z)
    # (n, 2), a row for each pass; "audio+emotion" holds both words
    drops = torch.tensor([("audio" in dropped, "emotion" in dropped) for dropped in weights])
    drop_audio, drop_emotion = drops.repeat_interleave(B, 0).T.to(z.device)
    emotion = torch.where(drop_emotion, NO_EMOTION, emotion.repeat(n))
    # with the type and device of the weights, one copy per pass
    z, audio, identity, prev = [torch.cat([x.to(model.null_audio)] * n)
                                for x in (z, audio, identity, prev)]
    v = model(z, t.expand(n * B), audio, emotion, identity, prev, drop_audio).float()
    return sum(weight * v_ for weight, v_ in zip(weights.values(), v.chunk(n)))


def euler_times(steps, straight=False):
    """The t at which each step begins, from 1, noise, towards 0, motion; steps=0: the usual number.

    Usual are ten steps of equal size. A straight student takes two, from 1 and 1/4: the first may
    go far, and the shorter the last one is, the less error of its own it adds."""
    steps = steps or (2 if straight else 10)
    if steps < 1:
        raise ValueError(f"steps={steps}: should be 1 or more")
    times = 1 - torch.arange(steps) / steps
    return times.square() if straight else times


def euler(velocity, z, times):
    """Follow the flow from noise at times[0] to motion at 0, in a step per time; velocity(z, t)."""
    for t, end in pairwise([*times, 0.0]):
        z = z - (t - end) * velocity(z, t)         # Eq. 2 prints a plus; with v = eps - z0 only
    return z                                       # the minus leads to data


def windows(frames, chunk, overlap, past, emotions):
    """Cut a voice, as it arrives, into windows for `stream`: yields (voice, stride, emotion).

    voice (n, L, A), n <= chunk; the next window begins `stride` frames later. With chunk=100 and
    overlap=16 the first one holds frames 0 .. 99, the second 84 .. 183. Frames 84 .. 99 have motion
    from the first one already, so a voice that ends with them has no second one.

    `past`: the voice begins with so many frames of silence, which need no motion. Of each window
    `stream` yields `stride` frames from its frame `past` on: those before are silence or, in later
    windows, were yielded already and are context.
    emotions: [(label, duration), ...], in frames, which may be fractions. Each begins a new window:
    an emotion of 30 frames has the window 0 .. 99 and stride 30, the next one begins with the
    window 30 .. 129 (unless the voice ends in its first 16 frames, which have motion already)."""
    voice = []                                     # of the window
    # how many at its start need no motion: silence in the first window, the overlap in later ones
    known = past
    frames_left = 0                                # of the emotion
    frames = iter(frames)
    for emotion, duration in emotions:
        frames_left += duration                    # a rest below 1 goes over to the next emotion
        while frames_left >= 1:
            voice.extend(islice(frames, chunk - len(voice)))
            if len(voice) <= known:                # the voice has ended
                return
            stride = int(min(chunk - overlap, frames_left))
            # silence before the voice is of (1, 1), and broadcast to (L, A)
            yield torch.stack(torch.broadcast_tensors(*voice)), stride, emotion
            voice = voice[stride:]
            frames_left -= stride
            known = overlap


@torch.inference_mode()
def stream(model, audio, identity, prev, emotion=NO_EMOTION, steps=0, guidance=None,
           chunk=100, overlap=16, past=0, seed=0, noise=(), smooth=False):
    """Normalised motion for a voice of any length, piece by piece, in constant memory (Sec. 3.2.6).

    audio    (T, L, A), or an iterable of its frames (L, A) as they arrive
    identity (63,) canonical keypoints
    prev     (70,) normalised motion before the first frame, such as a face at rest
    emotion  0..8, or a list of (emotion, frames), one after the other, the final one to the end
    steps    number of Euler steps; 0: 10, or 2 if straight
    guidance {condition: lambda} of Eq. 8; else the model's own
    chunk    frames sampled at once (best: model.cfg.chunk); the last chunk is filled up with zeros
    overlap  frames of a chunk with which the next begins; they fade into it
    past     the first ones of these, which stay as they are; in the first chunk they are silence
    noise    (chunks, chunk, 70) in place of noise drawn from `seed`
    smooth   average the pose over three frames, in each chunk and across (best: model.cfg.smooth)
    Yields (n, 70) as soon as no later sound can change it. ValueError: an argument is bad."""
    if not 0 <= past <= overlap < chunk:
        raise ValueError(f"should be 0 <= past={past} <= overlap={overlap} < chunk={chunk}")
    if guidance is None:
        guidance = guidance_of(model.cfg)
    times = euler_times(steps, model.cfg.straight).to(model.mean)
    if guidance.keys() - {"audio", "emotion", "audio+emotion"}:
        raise ValueError(f"guidance {guidance}: should be of audio, emotion, audio+emotion")
    *turns, (last, _) = emotion if isinstance(emotion, list) else [(emotion, 0)]
    emotions = [*turns, (last, math.inf)]          # the final one goes on to the end
    network = fast_network(model, times, [NO_EMOTION, *dict(emotions)], chunk)  # each label once
    noises = iter(noise)
    generator = torch.Generator().manual_seed(seed)
    # Weights of the tail; for overlap=4, past=1: 1, 1, 2/3, 1/3. Frame past - 1 was the last to be
    # yielded, smoothed with frame `past`, which so has to stay, too. 1 / 0 is inf, cut to 1.
    fade = torch.arange(overlap, 0, -1)[:, None].div(overlap - past).clamp(max=1)
    silence = torch.zeros(past, 1, 1)
    # Of the previous window, at first empty: before, its last frame ahead of the new window;
    # tail, the motion of the overlap; eps, the noise of all frames that both hold.
    before = tail = eps = torch.empty(0, M)
    for voice, stride, label in windows(chain(silence, audio), chunk, overlap, past, emotions):
        padded = F.pad(voice, (0, 0, 0, 0, 0, chunk - len(voice)))     # zeros are log-mel's silence
        velocity = partial(guided_velocity, network, audio=padded[None],
                           emotion=torch.tensor([label], device=times.device),
                           identity=identity.view(1, 63), prev=prev.view(1, M), guidance=guidance)
        fresh = torch.randn(chunk - len(eps), M, generator=generator)
        eps = torch.cat([eps, fresh])
        z = next(noises, eps).view(1, chunk, M).to(times.device)       # `noise`, while it lasts
        motion = euler(velocity, z, times)[0].cpu()
        if smooth:
            motion = smooth_pose(motion)
        motion[:len(tail)].lerp_(tail, fade[:len(tail)])
        ready = motion[:len(voice)]
        if smooth:                                 # again, as the authors do; now across chunks
            ready = smooth_pose(torch.cat([before, ready]))[len(before):]
        yield ready[past:past + stride]            # the first `past` were yielded, or are silence
        prev = before = motion[stride - 1:stride]                      # `prev` is a condition
        tail = motion[stride:stride + overlap]
        eps = eps[stride:]
    if not len(before):
        raise ValueError("the audio has no frames")
    if len(ready) > past + stride:                 # the last window's overlap has no successor
        yield ready[past + stride:]


def generate(*args, **kwargs):
    """`stream`, joined: -> (T, 70)."""
    return torch.cat([*stream(*args, **kwargs)])


def smooth_pose(motion):
    """Average scale, translation and rotation over each frame and its neighbours; (n, 70)."""
    pose = motion[:, SCALE.start:].T
    pose = F.avg_pool1d(pose, 3, stride=1, padding=1, count_include_pad=False).T
    return torch.cat([motion[:, EXP], pose], 1)


# --------------------------------------------------------------------------------- faster sampling
# The same numbers with less work (tests/test_sampler.py compares them): AdaLN is computed for
# all steps at once, and its weights, 29 % of the network's, are not read again in each. Other
# numbers only in chunks shorter than the model's own, where attention would be too sharp.

def fast_network(model, times, emotions, chunk):
    """A copy of the model that shares its weights, for these times and emotions; the emotion that
    guidance drops to is one of them. In a chunk below the model's own, attention is less sharp.

    Every pair of a time and an emotion has a number here. Each adaln is replaced by a table of what
    it computes, a row for each pair; `conditioning` returns the pair's number, with which a block's
    adaln(c) looks up the row."""
    conditions = torch.cartesian_prod(times, times.new_tensor(emotions))
    t, emotion = conditions.T
    c = model.conditioning(t, emotion.long())[:, 0]
    # deepcopy takes these for copied already
    shared = {id(p): p for p in model.parameters()}
    network = copy.deepcopy(model, shared)
    # A softmax over fewer tokens is sharper, and the toy's mouth opens too far. Products of q and k
    # that shrink like the logarithm of the number of tokens, four a frame, keep it as it is in
    # chunks of cfg.chunk, where it is left alone (after arXiv 2202.12172).
    sharpness = min(1, math.log(4 * chunk, 4 * model.cfg.chunk))
    for module in network.modules():
        if hasattr(module, "adaln"):
            module.adaln = nn.Embedding.from_pretrained(module.adaln(c))
        if hasattr(module, "q_norm"):
            module.q_norm.weight = nn.Parameter(sharpness * module.q_norm.weight)

    def row(t, emotion):
        """t (B,), emotion (B,) -> the pair's number (B, 1): the nearest's, for times are floats."""
        given = torch.stack([t, emotion], 1)
        return torch.cdist(given, conditions, p=1).argmin(1, keepdim=True)
    network.conditioning = row
    if times.is_cuda:
        network.forward = recorded(network.forward)
    return network


def recorded(function):
    """A function of tensors on a GPU, of the same shapes in each call, as a CUDA graph: the first
    call records all that it launches, and every call replays that at once, for to launch kernels
    one by one takes longer than they run."""
    graph = None

    def replay(*given):
        nonlocal graph
        if not graph:
            places = tuple(x.clone() for x in given)                   # where the graph reads
            # on their device, which a thread (sample.ahead's) does not inherit
            with torch.cuda.device_of(places[0]):
                graph = torch.cuda.make_graphed_callables(function, places, num_warmup_iters=1)
        return graph(*given)
    return replay


# ------------------------------------------------------------------------------------- checkpoints
@contextmanager
def explained(what):
    """An error in its block becomes a ValueError: what is wrong and what to do, then the error."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({error!s:.300})")


def read_checkpoint(path, advice="fetch it again, or train it first"):
    """What torch.save wrote, tensors and plain values only: a file that runs code is refused."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                     # truncated, foreign, or a pickle with code
        # without torch's own text, which may advise to load such a file all the same
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}); "
                         f"{advice}") from None


def load_strictly(places, tensors):
    """Copy tensors into those of the same names; ValueError tells the first that does not fit."""
    def shape(x):
        # public files differ in axes of size 1; what is no tensor is shown, in 40 letters at most
        return f"of shape {[*x.squeeze().shape]}" if torch.is_tensor(x) else f"{x!s:.40}"
    for name in places | tensors:
        if name.endswith("num_batches_tracked"):   # BatchNorm's, of no use, and some files lack it
            continue
        needed = shape(places.get(name, "absent"))
        found = shape(tensors.get(name, "absent"))
        if needed != found or not tensors[name].isfinite().all():
            raise ValueError(f"{name} is {found}, should be {needed} and finite")
        places[name].copy_(tensors[name].view_as(places[name]))


def load_statistics(model, path):
    """Set the model's mean and std from a file with both, such as the authors' mean.pt."""
    advice = "the released one is src/datasets/mean.pt of the authors' repository"
    state = read_checkpoint(path, advice)
    with explained(f"{path}: no mean and std of motion; {advice}"):
        load_strictly({"mean": model.mean, "std": model.std}, state)


# Regular expressions, applied from top to bottom, each to what the one before made, turn a
# parameter's name of ours, four.0.paths.1.qkv.weight, into the one in net-200.pth,
# blocks4.0.attn1.qkv_au1.weight. Streams are called xs (motion) and au or audio there, with a
# number. Step by step:
#     four.0.paths.1.adaln -> blocks4.0.au1.adaln -> blocks4.0.audio1.adaln
#                          -> blocks4.0.adaLN_modulation_audio1.1
#     four.0.paths.1.heads.q_norm -> blocks4.0.au1.heads.q_norm -> blocks4.0.attn1.au_q_norm1
RELEASED = [row.split() for row in r"""
    null_audio                          null_audio_feat
    emotion_embedder                    emo_embedder.embedding_table
    (motion|identity|time)_embedder     \1_embedder.mlp
    audio_embedder.0                    audio_embedder.proj1
    audio_embedder.2                    audio_embedder.proj2
    audio_embedder.4                    audio_embedder.proj3
    audio_embedder.5                    audio_embedder.norm
    head.adaln                          final_layer.adaLN_modulation.1
    head.linear                         final_layer.linear
    four.(\d+).paths.0                  blocks4.\1.xs
    four.(\d+).paths.                   blocks4.\1.au
    two.(\d+).paths.0                   blocks2.\1.xs
    two.(\d+).paths.1                   blocks2.\1.au
    one.(\d+)                           blocks.\1.xs
    au(\d?).(adaln|mlp)                 audio\1.\2
    (xs|audio)(\d?).adaln               adaLN_modulation_\1\2.1
    (xs|audio)(\d?).mlp_in              \1_mlp\2.fc1
    (xs|audio)(\d?).mlp_out             \1_mlp\2.fc2
    (xs|au)(\d?).heads.(q|k)_norm       attn1.\1_\3_norm\2
    (xs|au)(\d?).proj                   attn1.\1_proj\2
    xs.qkv_mlp                          qkv_xs
    (xs|au)(\d?).qkv                    attn1.qkv_\1\2
    xs.out                              linear2
    """.strip().splitlines()]

RELEASED_CONFIG = dict(rope_streams=2, chunk=80, smooth=True)


def released_name(name):
    """The name in net-200.pth of a parameter of ours."""
    for ours, theirs in RELEASED:
        name = re.sub(ours, theirs, name)
    return name


def from_released(state, path, **changes):
    """The authors' net-200.pth as MoDA; its statistics come from their mean.pt."""
    state = {key.removeprefix("talking_head_dit."): x for key, x in state.items()}
    for unused in "scheduler.sigmas", "null_motion_feat":
        state.pop(unused, None)
    model = MoDA(Config(**RELEASED_CONFIG | changes))
    # the authors' nn.Parameter(...).to("cuda") is a plain tensor, and so was never saved
    if "null_audio_feat" not in state:
        torch.manual_seed(42)                      # any will do
        state["null_audio_feat"] = torch.randn(model.cfg.audio_dim)
        print(f"{path}: holds no null_audio_feat, one was drawn")
    places = {released_name(name): value.detach() for name, value in model.named_parameters()}
    load_strictly(places, state)
    return model
