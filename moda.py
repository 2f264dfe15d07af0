"""MoDA motion generator: audio, emotion and identity in, 70 motion numbers per frame out.

Sections and equations refer to arXiv 2507.03256. From top to bottom: settings, rotary positions, the joint attention
blocks, the network with its three fusion stages, its losses, the lip-sync expert, the sampler, checkpoints.
Letters: B clips, N frames at 25 fps, S streams of n tokens, D width, H heads, L x A audio layers x channels, M = 70."""
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn as nn
import torch.nn.functional as F

M = 70                                             # motion numbers per frame, in the released order:
EXP, SCALE, TRANS, ROT = slice(0, 63), slice(63, 64), slice(64, 67), slice(67, 70)
MOUTH = 58                                         # (19, y): the mouth opening, the widest channel of real speech
LIPS = [3 * point + axis for point in (6, 12, 14, 17, 19, 20) for axis in range(3)]
EMOTIONS = ["anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "none"]
NO_EMOTION = 8                                     # the null label that guidance drops to

@dataclass
class Config:
    width: int = 768
    heads: int = 12
    n_four: int = 3              # blocks of each fusion stage (Sec. 4.1.2): four-stream,
    n_two: int = 6               # two-stream,
    n_one: int = 12              # single-stream
    fusion: str = "c2f"          # Table 3: c2f, four (w/o C2F: all blocks four-stream), cross (w/ CABA)
    rope_streams: int = 4        # streams rotated in the four-stream stage: 4 in the paper, 2 in the released model
    audio_layers: int = 12       # 12 x 768 for wav2vec 2.0 / HuBERT base, 1 x A for log-mel
    audio_dim: int = 768
    emotion_adaln: bool = True   # emotion joins the timestep in AdaLN (Sec. 3.2.1); False: it is only a stream
    p_drop_audio: float = 0.5    # Sec. 4.1.2: condition dropout, what makes guidance (Eq. 8) possible
    p_drop_emotion: float = 0.1

PRESETS = {"moda": {}, "toy": dict(width=128, heads=2, n_four=1, n_two=1, n_one=1, audio_layers=1, audio_dim=160)}

# ------------------------------------------------------------------------------------------ positions and attention
def waves(position, n, theta):
    """Cosine and sine of position * theta^(-2j / n), (..., n / 2, 2): the turns of RoPE, and the embedding of time."""
    angle = position[..., None] * torch.exp(-torch.tensor(theta).log() * torch.arange(0, n, 2).to(position.device) / n)
    return torch.stack([angle.cos(), angle.sin()], -1)

def rotate(x, table):
    """Turn the channel pairs (2i, 2i + 1) of x (..., n, d) by the first n rows of the table, in float32."""
    (a, b), (c, s) = x.float().unflatten(-1, (-1, 2)).unbind(-1), table[:x.size(-2)].unbind(-1)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).type_as(x)

def modulate(x, shift, scale):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

def linear(n_in, n_out, aligned=0, gain=1.0):
    """Linear layer, Xavier-uniform, biases zero except the first `aligned`: those of q and k start at 1.
    Not in the paper: with a common direction in every q and k, RoPE makes attention begin on the diagonal, each frame
    listening to its own moment in every stream. Finding that from zero takes longer than a short training has."""
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight, gain)
    layer.bias.data.copy_(torch.arange(n_out) < aligned)
    return layer

def split_heads(qkv, gain, table):
    """(B, n, 3D) -> q, k, v (B, H, n, d); q and k get their RMSNorm per head, with its gain (2, d), and are rotated."""
    *qk, v = qkv.unflatten(-1, (3, -1, gain.size(-1))).permute(2, 0, 3, 1, 4)
    return *(rotate(F.rms_norm(x, g.shape, g, eps=1e-5), table) for x, g in zip(qk, gain)), v

class JointBlock(nn.Module):
    """Joint attention over S streams (Sec. 3.2.2, Fig. 4): own AdaLN, projections, norms, feed-forward; one softmax."""
    def __init__(self, cfg, S):
        super().__init__()
        D = cfg.width
        self.adaln = linear(D, 6 * S * D, gain=0)  # per stream: shift, scale, gate of attention and of feed-forward
        self.qkv = nn.ModuleList(linear(D, 3 * D, aligned=2 * D) for _ in range(S))
        self.qk_gain = nn.Parameter(torch.ones(S, 2, D // cfg.heads))
        self.out = nn.ModuleList(linear(D, D) for _ in range(S))
        self.mlp = nn.ModuleList(nn.Sequential(linear(D, 4 * D), nn.GELU("tanh"), linear(4 * D, D)) for _ in range(S))

    def forward(self, xs, mods, table, heard=None):
        """Streams xs, (B, n, D) each -> the same; the first has N tokens, and a single token stands for N equal ones.
        mods (6 S, B, 1, D); table: the first n rows turn a stream of n; heard (B, 1, 1, keys): which keys count."""
        lengths, mods = [x.size(1) for x in xs], mods.unflatten(0, (len(xs), 6))
        qkv = [f(modulate(x, mod[0], mod[1])) for f, x, mod in zip(self.qkv, xs, mods)]    # (B, n, 3D) per stream
        q, k, v = zip(*[split_heads(x, gain, table) for x, gain in zip(qkv, self.qk_gain)])      # (B, H, n, d) each
        # a key that stands for N is repeated, so that the softmax counts it N times
        k, v = (torch.cat([x.expand(-1, -1, max(n, lengths[0]), -1) for x, n in zip(kv, lengths)], 2) for kv in (k, v))
        y = F.scaled_dot_product_attention(torch.cat(q, 2), k, v, heard).transpose(1, 2).flatten(2)
        xs = [x + mod[2] * f(y) for f, x, y, mod in zip(self.out, xs, y.split(lengths, 1), mods)]
        return [x + mod[5] * f(modulate(x, mod[3], mod[4])) for f, x, mod in zip(self.mlp, xs, mods)]

class SingleBlock(nn.Module):
    """One stream for all tokens; attention and feed-forward run side by side and share their projections."""
    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.adaln = linear(D, 3 * D, gain=0)      # shift, scale, gate
        self.qkv_mlp = linear(D, 7 * D, aligned=2 * D)
        self.qk_gain = nn.Parameter(torch.ones(2, D // cfg.heads))
        self.out = linear(5 * D, D)

    def forward(self, x, mods, table, heard=None, keep=None):
        """x (B, n, D) -> (B, keep, D): all tokens are heard, only the first `keep` ask, are fed forward, carried on."""
        u = modulate(x, mods[0], mods[1])
        (W, W_mlp), (b, b_mlp) = (p.tensor_split([3 * x.size(-1)]) for p in self.qkv_mlp.parameters())
        q, k, v = split_heads(F.linear(u, W, b), self.qk_gain, table)
        y = F.scaled_dot_product_attention(q[:, :, :keep], k, v, heard).transpose(1, 2).flatten(2)
        h = F.gelu(F.linear(u[:, :keep], W_mlp, b_mlp), approximate="tanh")
        return x[:, :keep] + mods[2] * self.out(torch.cat([y, h], -1))

# ------------------------------------------------------------------------------------------------------ the network
class MotionModel(nn.Module):
    """What MoDA and ALSE share: a config, the statistics of the motion they learned from, and how to load them."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.mean, self.std = nn.Buffer(torch.zeros(M)), nn.Buffer(torch.ones(M))

    def size(self, portrait):
        """How large a face is against the average of the training data: (..., 70) -> factors per channel, (..., 70)."""
        size = (portrait[..., SCALE] + 1e-5) / (self.mean[SCALE] + 1e-5)
        return F.pad(size[..., [0] * 4], (63, 3), value=1.0)               # only scale and translation grow with it

    def normalise(self, motion, size=1.0):
        """(..., 70) in LivePortrait units -> the network's; with `size`, as if the face were of average size."""
        return (motion / size - self.mean) / (self.std + 1e-5)             # some channels never move: std 0

    def denormalise(self, z, size=1.0):
        return (z * (self.std + 1e-5) + self.mean) * size

    def hear(self, audio):
        """Audio (B, N, L, A) flat, (B, N, L * A); ValueError if its features are not the kind that the model knows."""
        known, given = (self.cfg.audio_layers, self.cfg.audio_dim), tuple(audio.shape[2:])
        require(known == given, f"the model hears {known} features per frame, not {given}: name their audio encoder")
        return audio.flatten(2)

    @classmethod
    def from_pretrained(cls, path):
        """Load a checkpoint of ours or the released net-200.pth, ready for inference; ValueError if it does not fit."""
        state = read_tensors(path)
        if cls is MoDA and any(key.endswith("motion_embedder.mlp.0.weight") for key in state):
            return from_released(state, path).eval()
        with explained(path, f"not a {cls.__name__} that this version knows", "train it anew"):
            require(state.get("kind") == cls.__name__, f"it holds {state.get('kind', 'nothing')}")
            return load_strictly(cls(Config(**state["config"])), state.get("ema") or state["model"], path).eval()

class MoDA(MotionModel):
    """The motion generation network (Fig. 3): the velocity of noisy motion under audio, emotion, identity and prev."""
    def __init__(self, cfg):
        super().__init__(cfg)
        D, depth = cfg.width, cfg.n_four + cfg.n_two + cfg.n_one
        stages = {"c2f": (cfg.n_four, cfg.n_two, cfg.n_one, 0), "four": (depth, 0, 0, 0), "cross": (0, 0, 0, depth)}
        require(cfg.fusion in stages and cfg.width % (2 * cfg.heads) == 0,
                f"{cfg}: width should be an even multiple of heads, fusion one of {', '.join(stages)}")
        four, two, one, cross = stages[cfg.fusion]
        embedder = lambda n_in: nn.Sequential(linear(n_in, D), nn.SiLU(), linear(D, D))
        self.motion_in, self.identity_in, self.time_in = embedder(2 * M), embedder(63), embedder(256)
        self.emotion_in = nn.Embedding(len(EMOTIONS), D)
        self.audio_in = nn.Sequential(linear(cfg.audio_layers * cfg.audio_dim, D), nn.ReLU(), linear(D, D), nn.ReLU(),
                                      linear(D, D), nn.RMSNorm(D, eps=1e-6))
        self.null_audio = nn.Parameter(torch.randn(cfg.audio_dim))         # what a dropped voice sounds like
        self.four = nn.ModuleList(JointBlock(cfg, 4) for _ in range(four))
        self.two = nn.ModuleList(JointBlock(cfg, 2) for _ in range(two))
        self.one = nn.ModuleList(SingleBlock(cfg) for _ in range(one))
        self.cross = nn.ModuleList(block for _ in range(cross) for block in (JointBlock(cfg, 1), SingleBlock(cfg)))
        self.adaln = linear(D, 2 * D, gain=0)                              # shift and scale of the head
        self.head = nn.Linear(D, M)

    def forward(self, z, t, audio, emotion, identity, prev, drop_audio=None, mask=None):
        """Velocity v, estimating eps - z0, of normalised noisy motion.
        z (B, N, 70); t (B,) in [0, 1], 1 = noise; audio (B, N, L, A); emotion (B,) 0..8; identity (B, 63); prev (B, 70)
        the normalised frame before the window; drop_audio (B,) bool; mask (B, N) bool, real frames -> (B, N, 70)."""
        given = self.conditions(audio, emotion, identity, prev, drop_audio)
        return self.fuse(z, given, self.modulations(t, emotion), mask)

    def conditions(self, audio, emotion, identity, prev, drop_audio=None):
        """All that no denoising step changes: prev and the embedded conditions, (B, N, .) each, and the RoPE table."""
        N = audio.size(1)
        a, null = self.hear(audio), self.null_audio.repeat(self.cfg.audio_layers)          # (B, N, L * A), (L * A)
        a = self.audio_in(a if drop_audio is None else torch.where(drop_audio[:, None, None], null, a))    # (B, N, D)
        n = N if self.cfg.rope_streams == 4 else 1     # not rotated (row 0 turns nothing) all N are equal: one will do
        e, i = (x[:, None].expand(-1, n, -1) for x in (self.emotion_in(emotion), self.identity_in(identity)))
        table = waves(torch.arange(N, device=audio.device), self.cfg.width // self.cfg.heads, 256)
        return prev[:, None].expand(-1, N, -1), a, e, i, table.repeat(4, 1, 1)        # every modality counts 0..N-1

    def modulations(self, t, emotion):
        """Each block's K shifts, scales, gates, in the order in which `fuse` takes them, the head's last.
        t (..., B), emotion (B,) -> a list of (K, ..., B, 1, D); K is 6 per stream of a joint block, 3, or 2."""
        wave = waves(1000 * t, 256, 10000).mT.flatten(-2)                  # (..., B, 256), cosines first
        c = F.silu(self.time_in(wave.to(self.head.weight)) + self.cfg.emotion_adaln * self.emotion_in(emotion))
        mods = [x.adaln(c) for x in (*self.four, *self.cross, *self.two, *self.one, self)]        # self: the head's
        return [x.unflatten(-1, (-1, self.cfg.width)).movedim(-2, 0).unsqueeze(-2) for x in mods]

    def fuse(self, z, conditions, mods, mask=None):
        """The three fusion stages, coarse to fine (Sec. 3.2.3); z (B, N, 70), mask (B, N) -> v (B, N, 70)."""
        prev, a, e, i, table = conditions
        N, mods = z.size(1), iter(mods)
        heard = None if mask is None else mask.repeat(1, 4)[:, None, None]
        m = self.motion_in(torch.cat([prev, z], -1).to(a))                 # (B, N, 2M) -> (B, N, D), prev first
        for block in self.four:                                            # stage 1: every modality has its own weights
            m, a, e, i = block([m, a, e, i], next(mods), table, heard)
        cond = torch.cat([x.expand(-1, N, -1) for x in (a, e, i)], 1)      # (B, 3N, D) the conditions merge
        # w/ CABA, else no such blocks: motion hears itself, then the conditions alone, as cross-attention does
        others = F.pad(z.new_ones(1, 3 * N) if mask is None else mask.repeat(1, 3), (N, 0))[:, None, None] > 0
        for self_block, cross_block in zip(self.cross[::2], self.cross[1::2]):
            m, = self_block([m], next(mods), table, heard if mask is None else heard[..., :N])
            m = cross_block(torch.cat([m, cond], 1), next(mods), table, others, keep=N)
        for block in self.two:                                             # stage 2: motion and its conditions
            m, cond = block([m, cond], next(mods), table, heard)
        x = torch.cat([m, cond], 1)                                        # (B, 4N, D) stage 3: all merge
        for block in self.one:
            x = block(x, next(mods), table, heard, keep=N if block is self.one[-1] else None)
        return self.head(modulate(x[:, :N], *next(mods)))

# -------------------------------------------------------------------------------------------------------- the losses
def draw(cfg, B, N, generator):
    """The random draws of a training step: times, noise, dropped conditions; on the CPU, for any device."""
    return dict(t=torch.rand(B, generator=generator), eps=torch.randn(B, N, M, generator=generator),
                drop_audio=torch.rand(B, generator=generator) < cfg.p_drop_audio,
                drop_emotion=torch.rand(B, generator=generator) < cfg.p_drop_emotion)

def losses(model, z0, audio, emotion, identity, prev, mask, t, eps, drop_audio, drop_emotion, expert=None, tau=0.4):
    """L_RF, L_vel, gated L_ALSE: Eq. 6 is their sum. z0 (B, N, 70) normalised; t .. drop_emotion from `draw`;
    expert(audio, z, mask) -> unit vectors a and m."""
    z0, t_ = z0 * mask[..., None], t[:, None, None]
    z_t, x = (1 - t_) * z0 + t_ * eps, eps - z0                            # Sec. 3.1
    v = model(z_t, t, audio, torch.where(drop_emotion, NO_EMOTION, emotion), identity, prev, drop_audio, mask)
    errors = [(v - x).diff(n=k, dim=1) for k in range(3)]                  # Eq. 4; Eq. 5: from frame to frame, twice
    real = [mask.unfold(1, k + 1, 1).all(-1) for k in range(3)]            # (B, N - k): all k + 1 frames are real
    mse = [(e ** 2 * r[..., None]).sum() / (M * r.sum()).clamp(min=1) for e, r in zip(errors, real)]
    sync = torch.zeros_like(t) if expert is None else sync_loss(*expert(audio, z_t - t_ * v, mask), mask)    # of v's z0
    return mse[0], mse[1] + mse[2], (sync * (sync < tau) * ~drop_audio).mean()     # Eq. 7, where there is a voice

def sync_loss(a, m, mask, in_sync=True):
    """Cross-entropy of the cosine of ALSE's a and m, (B, N, D) each, averaged over each clip's frames -> (B,)."""
    p = (a.float() * m).sum(-1).clamp(1e-4, 1 - 1e-4)                      # bfloat16 would round the limit to 1
    return (-(p if in_sync else 1 - p).log() * mask).sum(1) / mask.sum(1).clamp(min=1)

class Residual(nn.Conv1d):
    """x + convolution over time of GELU(RMSNorm(x)); x (B, N, D)."""
    def forward(self, x):
        return x + super().forward(F.gelu(F.rms_norm(x, x.shape[-1:])).mT).mT

class ALSE(MotionModel):
    """Adaptive Lip-motion Synchronization Expert (Sec. 3.2.4): do this voice and these lips belong together?
    The paper's supplement is not public; its text and SyncNet support this reading: an audio and a lip-motion tower, a
    unit vector per frame each, their cosine trained as the probability of sync, against shifted and foreign pairs."""
    def __init__(self, cfg, kernel=5, depth=4):
        super().__init__(cfg)
        tower = lambda n_in: nn.Sequential(linear(n_in, cfg.width), *(
            Residual(cfg.width, cfg.width, kernel, padding="same") for _ in range(depth)))
        self.audio, self.motion = tower(cfg.audio_layers * cfg.audio_dim), tower(len(LIPS))

    def forward(self, audio, motion, mask):
        """audio (B, N, L, A), motion in LivePortrait units (B, N, 70), mask (B, N) -> unit vectors, 2 x (B, N, D)."""
        a, m = (x * mask[..., None] for x in (self.hear(audio), self.normalise(motion)[..., LIPS]))
        return [F.normalize(F.relu(x), dim=-1) for x in (self.audio(a), self.motion(m))]    # >= 0: cosines are chances

    def pretraining_loss(self, audio, motion, mask, shift):
        """In sync as recorded; out of sync with the voice `shift` frames late, or from the next clip."""
        a, m = self(audio, motion, mask)
        apart = [sync_loss(a.roll(*by), m, mask & mask.roll(*by), in_sync=False) for by in ((shift, 1), (1, 0))]
        return (sync_loss(a, m, mask) + sum(apart) / 2).mean()

# -------------------------------------------------------------------------------------------------------- the sampler
def guidance_passes(guidance, emotion):
    """Eq. 8 as a sum of velocities: rows of (weight, audio dropped?, emotion). "audio+emotion" drops both together."""
    weights = Counter({(False, emotion): sum(guidance.values(), 1.0)})     # equal passes become one
    for key, scale in guidance.items():
        require({*key.split("+")} <= {"audio", "emotion"}, f"guidance {key!r}: should be audio, emotion, audio+emotion")
        weights["audio" in key, NO_EMOTION if "emotion" in key else emotion] -= scale
    return [(weight, *what) for what, weight in weights.items() if weight]

def euler(velocity, z, times):
    """Follow the flow from noise at times[0] to motion at 0; velocity(z, k) is v at times[k], and not known at 0."""
    for k, (t, t_next) in enumerate(zip(times, [*times[1:], 0.0])):
        z = z - (t - t_next) * velocity(z, k)      # Eq. 2 prints a plus; with v = eps - z0 only minus leads to data
    return z

@torch.inference_mode()
def stream(model, audio, identity, prev, emotion=NO_EMOTION, steps=10, guidance={"audio": 0.2}, chunk=100, overlap=16,
           seed=0, noise=None, smooth=False, first_chunk=0):
    """Normalised motion for a voice of any length, piece by piece, each as soon as it is final; memory stays constant.
    audio    (T, L, A), or an iterable of such pieces as they arrive; how it is cut changes nothing
    identity (63,) canonical keypoints; prev (70,) normalised motion before the first frame, the portrait's own
    emotion  0..8, or a list of (emotion, frames), one after the other, the last for torch.inf
    steps    number of equal Euler steps, or a list of times from 1 down
    chunk    frames sampled at once (Sec. 3.2.6), the last filled up with silence; its last `overlap` fade into the next
    noise    (chunks, chunk, 70) in place of noise drawn from `seed`
    smooth   average pose and scale over three frames, in each chunk and once more across chunks, as released
    first_chunk  frames of the first chunk, for an earlier start; 0: as many as the others"""
    times = [1 - k / steps for k in range(steps)] if isinstance(steps, int) else list(steps)
    device, length = model.mean.device, first_chunk or chunk
    require(times and 0 <= overlap < length <= chunk,
            f"steps={steps} should be 1 or more, 0 <= overlap={overlap} < first_chunk={first_chunk} <= chunk={chunk}")
    frames = (frame for piece in ([audio] if torch.is_tensor(audio) else audio) for frame in piece)
    voice = list(islice(frames, length))
    require(voice, "the audio has no frames")
    noises, generator = iter(() if noise is None else noise), torch.Generator().manual_seed(seed)
    fade = torch.linspace(0, 1, overlap + 1)[:-1, None]                    # 0, 1 / overlap .. < 1
    smoothed = smooth_pose if smooth else lambda motion: motion
    # noise that the next chunk shares; the frame before it, and those it fades into; what no chunk has yielded yet
    eps = before = tail = rest = torch.empty(0, M)
    for mood, frames_left in emotion if isinstance(emotion, list) else [(emotion, torch.inf)]:
        # all passes of a step run as one batch; their modulations are the same in every chunk
        weight, drop_audio, moods = (torch.tensor(x, device=device) for x in zip(*guidance_passes(guidance, mood)))
        mods = model.modulations(torch.tensor(times, device=device)[:, None], moods)         # (K, steps, B, 1, D) each
        batch = lambda x: x.to(model.head.weight).expand(len(weight), *x.shape)    # on its device, in its precision
        while frames_left >= 1 and len(voice) > len(tail):                 # or the tail holds all that is left
            window = F.pad(torch.stack(voice), (0, 0, 0, 0, 0, length - len(voice)))
            eps = torch.cat([eps, torch.randn(length - len(eps), M, generator=generator)])
            given = model.conditions(batch(window), moods, batch(identity.flatten()), batch(prev.flatten()), drop_audio)
            v = lambda z, k: torch.tensordot(weight, model.fuse(batch(z), given, [x[:, k] for x in mods]).float(), 1)
            motion = smoothed(euler(v, next(noises, eps).to(device), times).cpu())             # Eq. 2; v is Eq. 8
            motion[:len(tail)] = tail.lerp(motion[:len(tail)], fade[:len(tail)])
            # smoothing looks one frame ahead, into the tail: its fade starts at 0, so that frame is final as well
            ready = smoothed(torch.cat([before, motion[:len(voice)]]))[len(before):]
            stride = int(min(length - overlap, frames_left))
            yield ready[:stride]                                           # what no later chunk will touch
            prev, before, tail = motion[stride - 1], motion[stride - 1:stride], motion[stride:stride + overlap]
            eps, voice, rest = eps[stride:], voice[stride:], ready[stride:]
            length, frames_left = chunk, frames_left - stride
            voice += islice(frames, length - len(voice))
    if len(rest):
        yield rest

def sample(*args, **kwargs):
    """`stream`, joined: -> (T, 70)."""
    return torch.cat(list(stream(*args, **kwargs)))

def smooth_pose(motion):
    """Mean of scale, translation, rotation over each frame and its neighbours: (n, 70) -> the same."""
    pose = F.avg_pool1d(motion[:, 63:].T, 3, stride=1, padding=1, count_include_pad=False).T
    return torch.cat([motion[:, EXP], pose], 1)

# ------------------------------------------------------------------------------------------ complaints, checkpoints
class UsageError(Exception):
    """A flag that makes no sense."""

def require(fine, told, error=ValueError):
    """What has to be so, and what the user is told where it is not."""
    if not fine:
        raise error(told)

@contextmanager
def explained(what, complaint, advice, error=ValueError):
    """Whatever goes wrong inside becomes one line about `what`, a file or a flag."""
    try:
        yield
    except Exception as reason:
        raise error(f"{what}: {complaint} ({reason!s:.200}); {advice}") from None

def save(path, state, keep="", write=torch.save):
    """Write a checkpoint so that a crash or a full disk never harms the one already there, which is kept as `keep`."""
    with explained(path, "could not be saved", "an earlier one is untouched", OSError):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write(state, f"{path}.tmp")
        with open(f"{path}.tmp", "rb+") as file:
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, os.path.join(os.path.dirname(path), keep))
        os.replace(f"{path}.tmp", path)

def read_tensors(path, advice="fetch it again, or train it first"):
    """What torch.save wrote, tensors and plain values only: a file that would run code is refused."""
    with explained(path, "not a readable checkpoint", advice):             # truncated, foreign, or a pickle with code
        return dict(torch.load(path, map_location="cpu", weights_only=True))

def released_parameters(model):
    """Every tensor of the released file by its name there, as our parameter. There, streams are called xs (motion) and
    au or au1..3 (audio, emotion, identity); "audio" where a name is long."""
    places = {"null_audio_feat": model.null_audio, "emo_embedder.embedding_table.weight": model.emotion_in.weight}
    layers = {"final_layer.adaLN_modulation.1": model.adaln, "final_layer.linear": model.head}
    layers |= {f"{name}_embedder.mlp": getattr(model, f"{name}_in") for name in ("motion", "identity", "time")}
    layers |= {f"audio_embedder.{x}": model.audio_in[i] for x, i in dict(proj1=0, proj2=2, proj3=4, norm=5).items()}
    joint = [(f"blocks4.{i}", block, ["", 1, 2, 3]) for i, block in enumerate(model.four)]
    joint += [(f"blocks2.{i}", block, ["", ""]) for i, block in enumerate(model.two)]
    for name, block, numbers in joint:
        for s, n in enumerate(numbers):
            short, long = ("au", "audio") if s else ("xs", "xs")
            layers |= {f"{name}.attn1.qkv_{short}{n}": block.qkv[s], f"{name}.attn1.{short}_proj{n}": block.out[s],
                       f"{name}.{long}_mlp{n}.fc1": block.mlp[s][0], f"{name}.{long}_mlp{n}.fc2": block.mlp[s][2]}
            places |= {f"{name}.attn1.{short}_{x}_norm{n}.weight": gain for x, gain in zip("qk", block.qk_gain[s])}
            places |= {f"{name}.adaLN_modulation_{long}{n}.1.{p}": rows.chunk(len(numbers))[s]     # ours holds all
                       for p, rows in block.adaln.named_parameters()}
    for i, block in enumerate(model.one):
        layers |= {f"blocks.{i}.adaLN_modulation_xs.1": block.adaln, f"blocks.{i}.qkv_xs": block.qkv_mlp,
                   f"blocks.{i}.linear2": block.out}
        places |= {f"blocks.{i}.attn1.xs_{x}_norm.weight": gain for x, gain in zip("qk", block.qk_gain)}
    return places | {f"{name}.{p}": value for name, layer in layers.items() for p, value in layer.named_parameters()}

def from_released(state, path):
    """The authors' net-200.pth as MoDA; sizes come from the shapes, statistics from their mean.pt (load_statistics)."""
    unused = [key for key in state if key.endswith(("scheduler.sigmas", "null_motion_feat"))]
    # the authors' Parameter(...).to("cuda") was no parameter: never saved, and drawn anew by who loads it
    voiceless = "its own" if "null_audio_feat" in state else "random, from a fixed seed; the authors' was another"
    print(f"{path}: the released MoDA; not used: {', '.join(unused) or 'nothing'}; null_audio_feat: {voiceless}")
    state = {key.removeprefix("talking_head_dit."): value for key, value in state.items() if key not in unused}
    count = lambda blocks: len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})
    size = lambda key: state[key].size(-1) if key in state else 768
    width, head = size("time_embedder.mlp.2.bias"), size("blocks.0.attn1.xs_q_norm.weight")
    with torch.device("meta"):
        model = MoDA(Config(width, width // head, count("blocks4"), count("blocks2"), count("blocks"), rope_streams=2,
                            audio_dim=size("audio_embedder.proj1.weight") // 12)).to_empty(device="cpu")
    null_audio = torch.randn(model.null_audio.shape, generator=torch.Generator().manual_seed(42))
    assumed = {"mean": torch.zeros(M), "std": torch.ones(M), "null_audio_feat": null_audio}
    return load_strictly(model, assumed | state, path, released_parameters(model) | dict(model.named_buffers()))

def load_statistics(model, path):
    """Set the model's mean and std from a file with both, such as the authors' mean.pt."""
    state = read_tensors(path, "the released one is src/datasets/mean.pt of the authors' repository")
    load_strictly(model, {x: state[x] for x in ("mean", "std") if x in state}, path, dict(model.named_buffers()))

def load_strictly(module, tensors, path, places=None):
    """Copy tensors into the module, or to the places they are named for; ValueError says the first that differs."""
    places = places or module.state_dict()
    for name in places | tensors:
        needed, found = (f"shape {[*x[name].squeeze().shape]}" if name in x else "absent" for x in (places, tensors))
        fine = needed == found and tensors[name].isfinite().all()
        require(fine, f"{path}: {name} is {found}, should be {needed} and finite: another model's file?")
        places[name].data.copy_(tensors[name].view_as(places[name]))
    return module
