"""MoDA motion generator: audio, emotion and identity in, 70 motion numbers per frame out.

Sections and equations refer to arXiv 2507.03256. From top to bottom: settings, rotary positions, the joint attention
blocks, the network with its three fusion stages, its losses, the lip-sync expert, the sampler, checkpoints.

Letters: B clips, N frames at 25 fps, D width, H heads, L x A audio layers x channels, M = 70 motion numbers.
"""
import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

M = 70                                             # motion numbers per frame, in the released order:
EXP, SCALE, TRANS, ROT = slice(0, 63), slice(63, 64), slice(64, 67), slice(67, 70)
SIZED = slice(63, 67)                              # what grows with the face: scale and translation
MOUTH = 58                                         # (19, y): the mouth opening, the widest channel of real speech
LIPS = [3 * point + axis for point in (6, 12, 14, 17, 19, 20) for axis in range(3)]
EMOTIONS = ["anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "none"]
NO_EMOTION = 8                                     # the null label that guidance drops to


@dataclass
class Config:
    width: int = 768
    heads: int = 12
    n_four: int = 3              # Sec. 4.1.2: 3 four-stream, 6 two-stream, 12 single-stream blocks
    n_two: int = 6
    n_one: int = 12
    fusion: str = "c2f"          # Table 3: c2f, four (w/o C2F: all blocks four-stream), cross (w/ CABA)
    rope_streams: int = 4        # streams rotated in the four-stream stage: 4 in the paper, 2 in the released model
    audio_layers: int = 12       # 12 x 768 for wav2vec 2.0 / HuBERT base, 1 x A for log-mel
    audio_dim: int = 768
    emotion_adaln: bool = True   # emotion joins the timestep in AdaLN; without, it is a stream only
    p_drop_audio: float = 0.5    # Sec. 4.1.2: condition dropout, what makes guidance (Eq. 8) possible
    p_drop_emotion: float = 0.1


PRESETS = {
    "toy": dict(width=128, heads=2, n_four=1, n_two=1, n_one=1, audio_layers=1, audio_dim=160),
    "moda": {},
}


# ------------------------------------------------------------------------------------------ positions and attention

def rope(n, dim, theta=256.0, device=None):
    """Rotary table for frames 0..n-1 of a head with `dim` channels: unit complex numbers, (n, dim / 2)."""
    freqs = theta ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.outer(torch.arange(n, device=device), freqs)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, table):
    """Turn the channel pairs (2i, 2i + 1) of x (..., n, d) by the angles of their frame, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def modulate(x, shift, scale):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def linear(n_in, n_out, aligned=0):
    """Linear layer, Xavier-uniform with zero bias; the first `aligned` biases, those of q and k, start at 1.

    Not in the paper: with a common direction in every q and k, RoPE alone makes attention begin on the diagonal, each
    frame listening to its own moment in every stream. Finding that from zero takes longer than a short training has.
    """
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    nn.init.ones_(layer.bias.detach()[:aligned])
    return layer


def mlp(n_in, n_hidden, n_out, act):
    return nn.Sequential(linear(n_in, n_hidden), act, linear(n_hidden, n_out))


class Heads(nn.Module):
    """Splits q, k, v (B, n, D) into heads (B, H, n, d); q and k get their per-head RMSNorm, then their rotation."""

    def __init__(self, cfg):
        super().__init__()
        self.dim = cfg.width // cfg.heads
        self.q_norm = nn.RMSNorm(self.dim, eps=1e-5)
        self.k_norm = nn.RMSNorm(self.dim, eps=1e-5)

    def forward(self, q, k, v, table):
        q, k, v = (x.unflatten(-1, (-1, self.dim)).transpose(1, 2) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table[:q.size(2)]), rotate(k, table)
        return q, k, v


def attend(q, k, v, bias=None):
    """(B, H, n, d) heads -> (B, n, D)."""
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def key_bias(*counts):
    """How often each key counts, (B, n) per stream: never if masked, N times if it stands for N -> (B, 1, 1, keys)."""
    return torch.cat(counts, 1).log()[:, None, None]


class Stream(nn.Module):
    """What one modality owns inside a joint block (Fig. 4c): projections, norms, feed-forward."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.qkv = linear(D, 3 * D, aligned=2 * D)
        self.heads = Heads(cfg)
        self.out = linear(D, D)
        self.mlp = mlp(D, 4 * D, D, nn.GELU("tanh"))


class JointBlock(nn.Module):
    """Joint attention over any number of streams (Sec. 3.2.2, Fig. 4b): own weights each, one softmax for all."""

    def __init__(self, cfg, n):
        super().__init__()
        self.streams = nn.ModuleList(Stream(cfg) for _ in range(n))
        self.n_mod = 6 * n                         # per stream: shift, scale, gate of attention and of feed-forward

    def forward(self, xs, mods, tables, bias=None):
        mods = mods.unflatten(0, (len(xs), 6))
        heads = [s.heads(*s.qkv(modulate(x, m[0], m[1])).chunk(3, -1), table)
                 for s, x, m, table in zip(self.streams, xs, mods, tables)]
        q, k, v = (torch.cat(parts, 2) for parts in zip(*heads))           # (B, H, tokens of all streams, d)
        ys = attend(q, k, v, bias).split([x.size(1) for x in xs], 1)       # back to their owners
        xs = [x + m[2] * s.out(y) for s, x, y, m in zip(self.streams, xs, ys, mods)]
        return [x + m[5] * s.mlp(modulate(x, m[3], m[4])) for s, x, m in zip(self.streams, xs, mods)]


class SingleBlock(nn.Module):
    """One stream for all tokens; attention and feed-forward run side by side and share one output projection."""
    n_mod = 3                                      # shift, scale, gate

    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.q_mlp = linear(D, 5 * D, aligned=D)
        self.kv = linear(D, 2 * D, aligned=D)
        self.heads = Heads(cfg)
        self.out = linear(5 * D, D)

    def forward(self, x, mods, table, bias=None, keep=None):
        """x (B, n, D) -> (B, keep, D): all tokens are heard, only the first `keep` are carried on."""
        u = modulate(x, mods[0], mods[1])
        D = x.size(-1)
        q, h = self.q_mlp(u[:, :keep]).split([D, 4 * D], -1)
        k, v = self.kv(u).chunk(2, -1)
        y = attend(*self.heads(q, k, v, table), bias)
        return x[:, :keep] + mods[2] * self.out(torch.cat([y, F.gelu(h, approximate="tanh")], -1))


# ------------------------------------------------------------------------------------------------------ the network

class MotionModel(nn.Module):
    """What MoDA and ALSE share: a config, the statistics of the motion they learned from, and how to load them."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(M))
        self.register_buffer("std", torch.ones(M))

    def size(self, portrait):
        """How large a face is against the average of the training data: portrait (..., 70) -> (..., 1)."""
        return (portrait[..., SCALE] + 1e-5) / (self.mean[SCALE] + 1e-5)

    def normalise(self, motion, size=1.0):
        """(..., 70) in LivePortrait units -> the network's; with `size`, as if the face were of average size."""
        motion = torch.cat([motion[..., EXP], motion[..., SIZED] / size, motion[..., ROT]], -1)
        return (motion - self.mean) / (self.std + 1e-5)                    # some channels never move: std 0

    def denormalise(self, z, size=1.0):
        motion = z * (self.std + 1e-5) + self.mean
        return torch.cat([motion[..., EXP], motion[..., SIZED] * size, motion[..., ROT]], -1)

    @classmethod
    def from_pretrained(cls, path):
        """Load a checkpoint of ours or the released net-200.pth, ready for inference; ValueError if it does not fit."""
        state = read_tensors(path)
        if cls is MoDA and any(key.endswith("motion_embedder.mlp.0.weight") for key in state):
            return from_released(state, path).eval()
        if state.get("kind") != cls.__name__:
            raise ValueError(f"{path}: holds {state.get('kind', 'no checkpoint of ours')}, not {cls.__name__}")
        known = {field.name for field in fields(Config)}
        for name in set(state["config"]) - known:
            raise ValueError(f"{path}: written by a newer version (its setting {name} is unknown here); update moda")
        model = cls(Config(**state["config"]))
        averaged = {key[7:]: value for key, value in state.get("average", {}).items() if key.startswith("module.")}
        load_strictly(model, averaged or state["model"], path)
        return model.eval()


class MoDA(MotionModel):
    """The motion generation network (Fig. 3): the velocity of noisy motion under audio, emotion, identity and prev."""
    def __init__(self, cfg):
        super().__init__(cfg)
        D, depth = cfg.width, cfg.n_four + cfg.n_two + cfg.n_one
        self.motion_in = mlp(2 * M, D, D, nn.SiLU())
        self.identity_in = mlp(63, D, D, nn.SiLU())
        self.time_in = mlp(256, D, D, nn.SiLU())
        self.emotion_in = nn.Embedding(len(EMOTIONS), D)
        self.audio_in = nn.Sequential(linear(cfg.audio_layers * cfg.audio_dim, D), nn.ReLU(), linear(D, D), nn.ReLU(),
                                      linear(D, D), nn.RMSNorm(D, eps=1e-6))
        self.null_audio = nn.Parameter(torch.randn(cfg.audio_dim))         # what a dropped voice sounds like
        cross = depth if cfg.fusion == "cross" else 0
        four, two, one = (cfg.n_four, cfg.n_two, cfg.n_one) if cfg.fusion == "c2f" else (depth - cross, 0, 0)
        self.four = nn.ModuleList(JointBlock(cfg, 4) for _ in range(four))
        self.two = nn.ModuleList(JointBlock(cfg, 2) for _ in range(two))
        self.one = nn.ModuleList(SingleBlock(cfg) for _ in range(one))
        self.cross = nn.ModuleList(block for _ in range(cross) for block in (JointBlock(cfg, 1), SingleBlock(cfg)))
        self.n_mods = [block.n_mod for block in (*self.four, *self.cross, *self.two, *self.one)] + [2]
        self.modulation = linear(D, sum(self.n_mods) * D)                  # AdaLN of every block, in one matmul
        self.head = nn.Linear(D, M)
        for weight in (self.time_in[0].weight, self.time_in[2].weight, self.emotion_in.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)                             # every block starts as the identity

    def forward(self, z, t, audio, emotion, identity, prev, drop_audio=None, mask=None):
        """Velocity v, estimating eps - z0, of normalised noisy motion.

        z (B, N, 70); t (B,) in [0, 1], 1 = noise; audio (B, N, L, A); emotion (B,) 0..8; identity (B, 63); prev (B, 70)
        the normalised frame before the window; drop_audio (B,) bool; mask (B, N) bool, real frames -> (B, N, 70).
        """
        conditions = self.conditions(audio, emotion, identity, prev, drop_audio)
        return self.fuse(z, conditions, self.modulations(t, emotion), mask)

    def conditions(self, audio, emotion, identity, prev, drop_audio=None):
        """All that no denoising step changes: prev and the embedded conditions, (B, N, .) each, and the RoPE table."""
        N, rotated = audio.size(1), self.cfg.rope_streams == 4
        if drop_audio is not None:
            audio = torch.where(drop_audio[:, None, None, None], self.null_audio, audio)
        a = self.audio_in(audio.flatten(2))                                # (B, N, L * A) -> (B, N, D)
        e, i = self.emotion_in(emotion)[:, None], self.identity_in(identity)[:, None]
        # Sec. 3.2.2 repeats them for every frame. Without rotation all N copies stay equal: one can stand for them.
        e, i = (x.expand(-1, N if rotated else 1, -1) for x in (e, i))
        return prev[:, None].expand(-1, N, -1), a, e, i, rope(N, self.cfg.width // self.cfg.heads, device=audio.device)

    def modulations(self, t, emotion):
        """Shifts, scales and gates of all blocks from timestep plus emotion: t (B,), emotion (B,) -> (K, B, 1, D)."""
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = 1000 * t[:, None] * freqs
        c = self.time_in(torch.cat([angle.cos(), angle.sin()], -1))
        if self.cfg.emotion_adaln:
            c = c + self.emotion_in(emotion)
        return self.modulation(F.silu(c)).unflatten(-1, (-1, self.cfg.width)).transpose(0, 1)[:, :, None]

    def fuse(self, z, conditions, mods, mask=None):
        """The three fusion stages, coarse to fine (Sec. 3.2.3); z (B, N, 70), mask (B, N) -> v (B, N, 70)."""
        prev, a, e, i, table = conditions
        N, mods = z.size(1), iter(mods.split(self.n_mods))
        count = z.new_ones(1, N) if mask is None else mask.type_as(z)
        alone = [count if x.size(1) == N else count.sum(1, keepdim=True) for x in (a, a, e, i)]
        bias = None if mask is None else key_bias(*4 * [count])
        table3, table4 = table.repeat(3, 1), table.repeat(4, 1)            # aligned: every modality counts 0..N-1

        m = self.motion_in(torch.cat([prev, z], -1))                       # (B, N, 2M) -> (B, N, D), prev first
        rotated = [table if s < self.cfg.rope_streams else None for s in range(4)]
        for block in self.four:                                            # every modality has its own weights
            m, a, e, i = block([m, a, e, i], next(mods), rotated, bias if e.size(1) == N else key_bias(*alone))
        cond = torch.cat([x.expand(-1, N, -1) for x in (a, e, i)], 1)      # (B, 3N, D) the conditions merge
        for own, ask in zip(self.cross[::2], self.cross[1::2]):            # w/ CABA: to itself, then to the conditions
            m, = own([m], next(mods), [table], key_bias(count))
            m = ask(torch.cat([m, cond], 1), next(mods), table4, key_bias(0 * count, count, count, count), N)
        for block in self.two:
            m, cond = block([m, cond], next(mods), [table, table3], bias)
        x = torch.cat([m, cond], 1)                                        # (B, 4N, D) all merge
        for block in self.one:
            x = block(x, next(mods), table4, bias, N if block is self.one[-1] else None)
        shift, scale = next(mods)
        return self.head(modulate(x[:, :N], shift, scale))


# -------------------------------------------------------------------------------------------------------- the losses

def draw(cfg, B, N, generator):
    """The chance in one training step: times, noise, dropped conditions. Drawn on the CPU, the same for any device."""
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    return dict(t=rand(B), eps=torch.randn(B, N, M, generator=generator),
                drop_audio=rand(B) < cfg.p_drop_audio, drop_emotion=rand(B) < cfg.p_drop_emotion)


def masked_mean(x, mask):
    """Mean of x (B, N, C) over the frames whose mask (B, N) is true."""
    return (x * mask[..., None]).sum() / (mask.sum() * x.size(-1)).clamp(min=1)


def losses(model, z0, audio, emotion, identity, prev, mask, t, eps, drop_audio, drop_emotion, expert=None, tau=0.4):
    """L_RF, L_vel and the gated L_ALSE, whose sum is Eq. 6; z0 (B, N, 70) normalised, mask (B, N), the rest drawn."""
    emotion = torch.where(drop_emotion, NO_EMOTION, emotion)
    z0, t_ = z0 * mask[..., None], t[:, None, None]
    z_t, x = (1 - t_) * z0 + t_ * eps, eps - z0                            # Sec. 3.1
    v = model(z_t, t, audio, emotion, identity, prev, drop_audio, mask)
    error, both = v - x, mask
    rf, vel = masked_mean(error ** 2, mask), 0                             # Eq. 4
    for _ in range(2):                                                     # Eq. 5: first and second differences
        error, both = error.diff(dim=1), both[:, 1:] & both[:, :-1]
        vel = vel + masked_mean(error ** 2, both)
    if expert is None:
        return rf, vel, torch.zeros_like(rf)
    sync = expert.loss(*expert(audio, z_t - t_ * v, mask), mask)           # (B,) of the predicted clean motion
    gate = (sync < tau) & ~drop_audio                                      # Eq. 7, clip by clip
    return rf, vel, (sync * gate).mean()


class ALSE(MotionModel):
    """Adaptive Lip-motion Synchronization Expert (Sec. 3.2.4): do this voice and these lips belong together?

    The paper keeps the details in a supplement that is not public. This is the reading its text and the SyncNet line
    of work support: an audio tower and a lip-motion tower, one unit vector per frame each, whose cosine is trained as
    the probability of being in sync, against pairs that are shifted in time or come from another clip.
    """

    def __init__(self, cfg, kernel=5, depth=4):
        super().__init__(cfg)
        tower = lambda n_in: nn.ModuleList([linear(n_in, cfg.width)] + [
            nn.Conv1d(cfg.width, cfg.width, kernel, padding=kernel // 2) for _ in range(depth)])
        self.audio, self.motion = tower(cfg.audio_layers * cfg.audio_dim), tower(len(LIPS))

    def forward(self, audio, z, mask):
        """audio (B, N, L, A), normalised motion z (B, N, 70), mask (B, N) -> unit vectors per frame, 2 x (B, N, D)."""
        def embed(tower, x):
            x = tower[0](x * mask[..., None]).transpose(1, 2)              # (B, D, N)
            for conv in tower[1:]:
                x = x + conv(F.gelu(F.rms_norm(x.mT, x.shape[1:2]).mT))
            return F.normalize(F.relu(x).mT, dim=-1)                       # >= 0, so that a cosine is a probability
        return embed(self.audio, audio.flatten(2)), embed(self.motion, z[..., LIPS])

    @staticmethod
    def loss(a, m, mask, in_sync=True):
        """Cross-entropy of the cosine of a and m, averaged over each clip's frames -> (B,)."""
        p = (a * m).sum(-1).clamp(1e-4, 1 - 1e-4)
        return (-(p if in_sync else 1 - p).log() * mask).sum(1) / mask.sum(1).clamp(min=1)

    def pretraining_loss(self, audio, z, mask, shift):
        """In sync as recorded; out of sync with the voice `shift` frames late, or from the next clip."""
        a, m = self(audio, z, mask)
        late = self.loss(a.roll(shift, 1), m, mask & mask.roll(shift, 1), in_sync=False)
        foreign = self.loss(a.roll(1, 0), m, mask & mask.roll(1, 0), in_sync=False)
        return (self.loss(a, m, mask) + (late + foreign) / 2).mean()


# -------------------------------------------------------------------------------------------------------- the sampler

def guidance_passes(guidance, emotion):
    """Eq. 8 as a weighted sum of velocities: rows of (weight, audio dropped?, emotion dropped?), the full pass first.

    A key such as "audio+emotion" drops both together; passes that would change nothing are left out.
    """
    rows = []
    for key, scale in guidance.items():
        names = set(key.split("+"))
        if not names <= {"audio", "emotion"}:
            raise ValueError(f"guidance {key!r}: conditions are audio and emotion, joined by + to drop them together")
        if scale and (names != {"emotion"} or emotion != NO_EMOTION):
            rows.append((-scale, "audio" in names, "emotion" in names))
    return [(1.0 - sum(row[0] for row in rows), False, False)] + rows


def euler(velocity, z, times):
    """Follow the flow from noise at times[0] to motion at 0 (Eq. 2); velocity(z, k) is v at times[k].

    Eq. 2 prints a plus; with v = eps - z0 only the minus leads from noise to data.
    """
    for k, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0])):
        z = z - (t - t_next) * velocity(z, k)
    return z


def window_sampler(model, emotion, steps, guidance):
    """All that windows share, computed once; returns sample_window(z, audio, identity, prev) -> motion (N, 70)."""
    device = model.mean.device
    times = [1 - k / steps for k in range(steps)] if isinstance(steps, int) else list(steps)
    if not times:
        raise ValueError("steps must be 1 or more")
    passes = guidance_passes(guidance, emotion)
    weight, drop_audio, drop_emotion = (torch.tensor(column, device=device) for column in zip(*passes))
    emotions = torch.where(drop_emotion, NO_EMOTION, emotion)
    B = len(passes)
    t = torch.tensor(times, device=device).repeat_interleave(B)
    mods = model.modulations(t, emotions.repeat(len(times))).unflatten(1, (-1, B))         # (K, steps, B, 1, D)

    def sample_window(z, audio, identity, prev):
        batch = lambda x: x.to(device).expand(B, *x.shape)                 # all passes of a step run as one batch
        conditions = model.conditions(batch(audio), emotions, batch(identity), batch(prev), drop_audio)

        def velocity(z, k):
            v = model.fuse(batch(z), conditions, mods[:, k])               # (B, N, 70)
            return torch.tensordot(weight, v, 1)                           # Eq. 8
        return euler(velocity, z.to(device), times)
    return sample_window


@torch.inference_mode()
def stream(model, audio, identity, prev, emotion=NO_EMOTION, steps=10, guidance={"audio": 0.2}, chunk=100, overlap=16,
           seed=0, noise=None, smooth=False):
    """Normalised motion for a voice of any length, piece by piece, each as soon as it is final; memory stays constant.

    audio    (T, L, A), or an iterable of such pieces as they arrive; how it is cut changes nothing
    identity (63,) canonical keypoints; prev (70,) normalised motion before the first frame, the portrait's own
    steps    number of equal Euler steps, or a list of times from 1 down
    chunk    frames sampled at once (Sec. 3.2.6); a short last one is filled up with silence. Its last `overlap`
             frames fade into the next chunk, whose `prev` is the frame just before it starts
    noise    (chunks, chunk, 70) in place of noise drawn from `seed`
    smooth   average pose and scale over three frames, in each chunk and once more across chunks, as released
    """
    if not 0 <= overlap < chunk:
        raise ValueError(f"overlap must lie between 0 and chunk - 1 = {chunk - 1}, not {overlap}")
    noise = frame_noise(chunk, overlap, seed) if noise is None else iter(noise)
    pieces = iter([audio] if torch.is_tensor(audio) else audio)
    parts = chunks(window_sampler(model, emotion, steps, guidance), pieces, identity.flatten(), prev.flatten(),
                   chunk, overlap, noise, smooth)
    yield from smoothed(parts) if smooth else parts


def sample(*args, **kwargs):
    """`stream`, joined: -> (T, 70)."""
    return torch.cat(list(stream(*args, **kwargs)))


def frame_noise(chunk, overlap, seed):
    """Noise (chunk, 70) for one chunk after the other. A frame that two chunks share has the same noise in both, so
    that they agree on it before they are faded."""
    generator, noise = torch.Generator().manual_seed(seed), torch.empty(0, M)
    while True:
        noise = torch.cat([noise, torch.randn(chunk - len(noise), M, generator=generator)])
        yield noise
        noise = noise[chunk - overlap:]


def chunks(sample_window, pieces, identity, prev, chunk, overlap, noise, smooth):
    """The loop of `stream`: sample a chunk, fade it in, hand out what no later chunk will touch."""
    stride, tail, waiting = chunk - overlap, None, None
    fade = torch.arange(overlap)[:, None] / max(overlap, 1)                # 0, 1/16 .. 15/16: the weight of the new
    while True:
        while (waiting is None or len(waiting) < chunk) and (piece := next(pieces, None)) is not None:
            waiting = piece if waiting is None else torch.cat([waiting, piece])
        if waiting is None or len(waiting) <= (0 if tail is None else overlap):
            break                                                          # the tail was all that is left
        window = F.pad(waiting[:chunk], (0, 0, 0, 0, 0, max(0, chunk - len(waiting))))
        motion = sample_window(next(noise), window, identity, prev).cpu()
        motion = smooth_pose(motion) if smooth else motion
        if tail is not None:
            motion[:overlap] = tail * (1 - fade) + motion[:overlap] * fade
        yield motion[:stride][:len(waiting)]
        prev, tail, waiting = motion[stride - 1], motion[stride:], waiting[stride:]
    if tail is None:
        raise ValueError("the audio has no frames")
    if len(waiting):
        yield tail[:len(waiting)]


def smooth_pose(motion):
    """Mean of scale, translation and rotation over each frame and its neighbours; (n, 70)."""
    pose = F.avg_pool1d(motion[:, 63:].T, 3, stride=1, padding=1, count_include_pad=False).T
    return torch.cat([motion[:, EXP], pose], 1)


def smoothed(parts):
    """`smooth_pose` of joined parts: one frame is held back until its right neighbour is known."""
    held = torch.empty(0, M)
    for part in parts:
        joined = torch.cat([held, part])
        yield smooth_pose(joined)[max(0, len(held) - 1):-1]
        held = joined[-2:]
    yield smooth_pose(held)[-1:]


# -------------------------------------------------------------------------------------------------------- checkpoints

def save(path, state, keep=""):
    """Write a checkpoint so that a crash or a full disk never harms the one already there, which is kept as `keep`."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, os.path.join(os.path.dirname(path), keep))
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path}: could not be saved ({error}); an earlier one is untouched") from None


def read_tensors(path, advice="fetch it again", mmap=False):
    """What torch.save wrote, tensors and plain values only: a file that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {advice}") from None
    except Exception as error:                                             # truncated, foreign, or a pickle with code
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); {advice}") from None


def released_layers(model):
    """Every tensor of the released file by name, as the parts of our parameters that its rows fill, in order.

    Streams are called xs (motion) and au or au1..3 (audio, emotion, identity); "audio" where a name is long.
    """
    layers = {"emo_embedder.embedding_table": model.emotion_in, "audio_embedder.norm": model.audio_in[5],
              "final_layer.linear": model.head}
    layers |= {f"audio_embedder.proj{i + 1}": model.audio_in[2 * i] for i in range(3)}
    mlps = {"motion": model.motion_in, "identity": model.identity_in, "time": model.time_in}
    layers |= {f"{name}_embedder.mlp.{i}": net[i] for name, net in mlps.items() for i in (0, 2)}
    modulated = {}                                 # shifts, scales and gates, in the order of our one large matrix
    joint = [(f"blocks4.{i}", block, ["", 1, 2, 3]) for i, block in enumerate(model.four)]
    joint += [(f"blocks2.{i}", block, ["", ""]) for i, block in enumerate(model.two)]
    for name, block, numbers in joint:
        for s, (stream, n) in enumerate(zip(block.streams, numbers)):
            short, long = ("au", "audio") if s else ("xs", "xs")
            layers |= {f"{name}.attn1.qkv_{short}{n}": stream.qkv, f"{name}.attn1.{short}_proj{n}": stream.out,
                       f"{name}.attn1.{short}_q_norm{n}": stream.heads.q_norm,
                       f"{name}.attn1.{short}_k_norm{n}": stream.heads.k_norm,
                       f"{name}.{long}_mlp{n}.fc1": stream.mlp[0], f"{name}.{long}_mlp{n}.fc2": stream.mlp[2]}
            modulated[f"{name}.adaLN_modulation_{long}{n}.1"] = 6
    for i, block in enumerate(model.one):
        layers |= {f"blocks.{i}.linear2": block.out, f"blocks.{i}.attn1.xs_q_norm": block.heads.q_norm,
                   f"blocks.{i}.attn1.xs_k_norm": block.heads.k_norm}
        modulated[f"blocks.{i}.adaLN_modulation_xs.1"] = 3
    modulated["final_layer.adaLN_modulation.1"] = 2

    parts = {f"{name}.{p}": [value] for name, layer in layers.items() for p, value in layer.named_parameters()}
    D = model.cfg.width
    for p in ("weight", "bias"):
        rows = getattr(model.modulation, p).split([n * D for n in modulated.values()])
        parts |= {f"{name}.{p}": [value] for name, value in zip(modulated, rows)}
        for i, block in enumerate(model.one):      # theirs holds q, k, v, mlp
            q, mlp = getattr(block.q_mlp, p).split([D, 4 * D])
            parts[f"blocks.{i}.qkv_xs.{p}"] = [q, getattr(block.kv, p), mlp]
    return parts


def from_released(state, path):
    """The authors' net-200.pth as MoDA; sizes come from the shapes, statistics from their mean.pt (load_statistics)."""
    state = {key.removeprefix("talking_head_dit."): value for key, value in state.items()}
    unused = [key for key in ("scheduler.sigmas", "null_motion_feat") if state.pop(key, None) is not None]
    null = state.pop("null_audio_feat", None)
    count = lambda blocks: len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})
    size = lambda key: state[key].size(-1) if key in state else 768
    width, head = size("time_embedder.mlp.2.bias"), size("blocks.0.attn1.xs_q_norm.weight")
    with torch.device("meta"):
        model = MoDA(Config(width, width // head, count("blocks4"), count("blocks2"), count("blocks"), rope_streams=2,
                            audio_dim=size("audio_embedder.proj1.weight") // 12))
    model.to_empty(device="cpu").load_state_dict({"mean": torch.zeros(M), "std": torch.ones(M)}, strict=False)
    fill(released_layers(model), state, path)
    print(f"{path}: released MoDA; not used: {', '.join(unused) or 'nothing'}")
    if null is None:       # the authors' Parameter(...).to("cuda") was no parameter: never trained, never saved
        null = torch.randn(model.cfg.audio_dim, generator=torch.Generator().manual_seed(42))
        print(f"{path}: no null_audio_feat; guidance uses a random vector of a fixed seed, the authors' used another")
    model.null_audio.data.copy_(null.flatten())
    return model


def load_statistics(model, path):
    """Set the model's mean and std from a file with both, such as the authors' mean.pt."""
    state = read_tensors(path, "the released one is src/datasets/mean.pt of the authors' repository")
    for name in ("mean", "std"):
        value = torch.as_tensor(state[name]).flatten() if name in state else torch.empty(0)
        if value.shape != (M,) or not value.isfinite().all():
            raise ValueError(f"{path}: {name} should be {M} finite numbers")
        getattr(model, name).copy_(value)


def load_strictly(module, tensors, path):
    """load_state_dict that names the file and the first tensor that does not fit."""
    fill({name: [torch.atleast_1d(value)] for name, value in module.state_dict().items()}, tensors, path)


@torch.no_grad()
def fill(places, tensors, path):
    """Copy each tensor into its place, a list of parts that its rows fill in order; ValueError names what differs."""
    for name in [*places, *tensors]:
        if name not in tensors or name not in places:
            reason = "missing" if name in places else "unknown"
            raise ValueError(f"{path}: {name} is {reason}; is it another model's file?")
        sizes, found = [len(part) for part in places[name]], torch.atleast_1d(tensors[name])
        shape = sum(sizes), *places[name][0].shape[1:]
        if found.shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(found.shape)}, not {shape}")
        for part, rows in zip(places[name], found.split(sizes)):
            part.copy_(rows)
