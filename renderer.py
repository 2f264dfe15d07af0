"""From motion to pictures: keypoints (Eq. 3), LivePortrait's networks, and a Sketch face that needs no weights.

Letters: B images, T frames; x_c (21, 3) canonical keypoints, x right, y down, z inward, the image spans -1..1.
Motion is in LivePortrait units: 63 expression offsets, scale, translation, pitch, yaw, roll in degrees.
"""
import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from moda import EXP, M, ROT, SCALE, TRANS, read_tensors

SIZE = 512                                         # pixels of a rendered frame, height and width


@dataclass
class Source:
    """A portrait, split: appearance f_s, canonical keypoints x_c (B, 63), motion (B, 70)."""
    f_s: object
    x_c: torch.Tensor
    motion: torch.Tensor


def rotation(pitch, yaw, roll):
    """Degrees (B,) each -> (B, 3, 3), the transpose of Rz Ry Rx: keypoints are row vectors, x_c R."""
    (p, y, r), one = (torch.deg2rad(angle) for angle in (pitch, yaw, roll)), torch.ones_like(pitch)
    rows = lambda *entries: torch.stack(entries, -1).unflatten(-1, (3, 3))
    nil = torch.zeros_like(one)
    Rx = rows(one, nil, nil, nil, p.cos(), -p.sin(), nil, p.sin(), p.cos())
    Ry = rows(y.cos(), nil, y.sin(), nil, one, nil, -y.sin(), nil, y.cos())
    Rz = rows(r.cos(), -r.sin(), nil, r.sin(), r.cos(), nil, nil, nil, one)
    return (Rz @ Ry @ Rx).mT


def keypoints(x_c, motion):
    """Eq. 3: x = s (x_c R + delta) + t, t_z = 0; (B, 21, 3) and (B, 70) -> (B, 21, 3)."""
    delta = motion[:, EXP].unflatten(-1, (-1, 3))
    t = motion[:, None, TRANS] * motion.new_tensor([1, 1, 0])
    return motion[:, SCALE, None] * (x_c @ rotation(*motion[:, ROT].T) + delta) + t


def relative(motion, portrait, neutral):
    """Driving motion (T, 70), seen from its `neutral` pose and expression, on top of the `portrait`'s own, (70,) each."""
    R, R0, Rs = (rotation(*m.view(-1, M)[:, ROT].T) for m in (motion, neutral, portrait))
    Q = (R @ R0.mT @ Rs).mT                                                # Rz Ry Rx
    angles = torch.stack([torch.atan2(Q[:, 2, 1], Q[:, 2, 2]), -torch.asin(Q[:, 2, 0].clamp(-1, 1)),
                          torch.atan2(Q[:, 1, 0], Q[:, 0, 0])], 1)
    moved = portrait + motion - neutral
    return torch.cat([moved[:, EXP], portrait[SCALE] * motion[:, SCALE] / neutral[SCALE], moved[:, TRANS],
                      torch.rad2deg(angles)], 1)


# ------------------------------------------------------------------------------------------------------------- pictures

def read_image(path):
    """Any picture Pillow reads, upright and on white where it is transparent -> RGB Image. ValueError if it is none."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture could be read ({error})") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def crop_box(image, crop=""):
    """The square to animate as x, y, size: "x,y,size" in pixels of the picture, or the largest in its centre."""
    width, height = image.size
    size = min(width, height)
    x, y, size = [int(v) for v in crop.split(",")] if crop else [(width - size) // 2, (height - size) // 2, size]
    if min(x, y) < 0 or size < 16 or x + size > width or y + size > height:
        raise ValueError(f"crop {x},{y},{size} (x, y, size; at least 16) does not lie inside the {width} x {height} picture")
    return x, y, size


def paste_back(frames, image, box, longest=1280):
    """Frames blended into the whole picture over a feathered edge; the picture is shrunk to `longest` and to even sides."""
    zoom = min(1, longest / max(image.size))
    x, y, size = (int(v * zoom) for v in box)
    picture = np.asarray(image.resize([int(n * zoom) // 2 * 2 for n in image.size]))
    outside = np.maximum(np.abs(np.arange(SIZE) - SIZE / 2) - 240, 0)      # pixels beyond the square 16..496
    mask = np.floor(255 * np.clip(1 - np.hypot(outside, outside[:, None]) / 16, 0, 1)).astype(np.uint8)
    fit = lambda array: np.asarray(Image.fromarray(array).resize((size, size), Image.BILINEAR))[:len(picture) - y, :picture.shape[1] - x]
    w = fit(mask)[..., None] / 255
    for frame in frames:
        whole = picture.copy()
        part = whole[y:y + size, x:x + size]
        part[:] = w * fit(frame) + (1 - w) * part
        yield whole


# -------------------------------------------------------------------------------------------------------- LivePortrait
# Five frozen networks, each a function of its file's weights. Golden rule of the reference: a keypoint is (x, y, z).

def spread(weight, up):
    """Kernel of the transposed convolution that equals nearest upsampling by `up` in height and width, then `weight`."""
    weight = weight.flip(tuple(range(2, weight.ndim))).transpose(0, 1)
    for axis in (0, 2):                                                    # F.pad counts axes from the last
        weight = sum(F.pad(weight, (0,) * axis + (shift, up - 1 - shift)) for shift in range(up))
    return weight


class Weights:
    """The weights of one file. A first pass with meta tensors looks every key up once, checks its shape and folds what
    can be folded; after it `ready` holds all that is needed, and nothing else may be left in the file."""

    def __init__(self, path, part, device, dtype):
        self.path, self.device, self.dtype, self.ready = path, device, dtype, {}
        tensors = read_tensors(path, GET)
        self.tensors = {key.removeprefix("module."): value for key, value in (tensors[part] if part else tensors).items()
                        if not key.endswith("num_batches_tracked")}

    def take(self, key, *shape):
        found = tuple(self.tensors[key].shape) if key in self.tensors else "no such key"
        if found != shape:
            raise ValueError(f"{self.path}: {key}: {found}, expected {shape}; {GET}")
        return self.tensors.pop(key).float()

    def done(self):
        for key in self.tensors:
            raise ValueError(f"{self.path}: {key} does not belong there; {GET}")
        return self

    def once(self, name, x, make):
        """The prepared tensors of layer `name`, made in the first pass."""
        if name not in self.ready:
            self.ready[name] = [t.to(self.device, self.dtype) for t in make()]
            if self.device.type == "cuda":                                 # the layout of tensor cores
                layout = {4: torch.channels_last, 5: torch.channels_last_3d}
                self.ready[name] = [t.contiguous(memory_format=layout.get(t.ndim, torch.contiguous_format)) for t in self.ready[name]]
        return [t.to(x.device) for t in self.ready[name]]

    def batch_norm(self, name, n):
        """Scale and shift of a BatchNorm in eval mode."""
        weight, bias, mean, var = (self.take(f"{name}.{key}", n) for key in ("weight", "bias", "running_mean", "running_var"))
        scale = weight / (var + 1e-5).sqrt()
        return scale, bias - mean * scale

    def conv(self, x, name, n_out, k=3, norm="", up=1, stride=1, groups=1, bias=True):
        """Nearest upsampling by `up`, convolution, BatchNorm `norm`, as one convolution; x (B, C, [D,] H, W)."""
        def make():
            shape, orig = (n_out, x.size(1) // groups, *(x.ndim - 2) * [k]), f"{name}.weight_orig"
            weight = self.take(orig if orig in self.tensors else f"{name}.weight", *shape)
            if f"{name}.weight_u" in self.tensors:                         # spectral norm, u and v as stored
                u, v = self.take(f"{name}.weight_u", n_out), self.take(f"{name}.weight_v", weight[0].numel())
                weight = weight / (u @ weight.flatten(1) @ v)
            b = self.take(f"{name}.bias", n_out) if bias else torch.zeros(n_out)
            if norm:
                scale, shift = self.batch_norm(norm, n_out)
                weight, b = (weight.transpose(0, -1) * scale).transpose(0, -1), b * scale + shift
            return spread(weight, up) if up > 1 else weight, b
        weight, b = self.once(name, x, make)
        x = x.to(weight.dtype)
        if up > 1:
            stride, padding = ((up, up), 1) if x.ndim == 4 else ((1, up, up), 1)
            return (F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d)(x, weight, b, stride, padding)
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, b, stride, k // 2 if stride == 1 else 0, 1, groups)

    def linear(self, x, name, n_out):
        make = lambda: (self.take(f"{name}.weight", n_out, x.size(-1)), self.take(f"{name}.bias", n_out))
        return F.linear(x, *self.once(name, x, make))

    def layer_norm(self, x, name):
        make = lambda: (self.take(f"{name}.weight", x.size(-1)), self.take(f"{name}.bias", x.size(-1)))
        return F.layer_norm(x, x.shape[-1:], *self.once(name, x, make), eps=1e-6)


def appearance(net, image):
    """F: image (B, 3, 256, 256) in 0..1 -> feature volume f_s (B, 32, 16, 64, 64)."""
    x = F.relu(net.conv(image, "first.conv", 64, norm="first.norm"))
    for i, n in enumerate((128, 256)):
        x = F.avg_pool2d(F.relu(net.conv(x, f"down_blocks.{i}.conv", n, norm=f"down_blocks.{i}.norm")), 2)
    x = net.conv(x, "second", 512, k=1).unflatten(1, (32, 16))             # flat channel = 16 c + depth
    for i in range(6):
        name = f"resblocks_3d.3dr{i}"
        scale, shift = net.once(f"{name}.norm1", x, lambda: net.batch_norm(f"{name}.norm1", 32))
        y = F.relu(x * scale[:, None, None, None] + shift[:, None, None, None])
        y = F.relu(net.conv(y, f"{name}.conv1", 32, norm=f"{name}.norm2"))
        x = x + net.conv(y, f"{name}.conv2", 32)
    return x


HEADS = dict(kp=63, exp=63, scale=1, t=3, pitch=66, yaw=66, roll=66)


def motion_heads(net, image):
    """M, a ConvNeXt V2: image (B, 3, 256, 256) in 0..1 -> dict of raw heads, sizes as in HEADS."""
    x, conv = image.movedim(1, -1), lambda x, *a, **k: net.conv(x.movedim(-1, 1), *a, **k).movedim(1, -1)
    for stage, (n, depth) in enumerate(zip((96, 192, 384, 768), (3, 3, 9, 3))):
        name = f"detector.downsample_layers.{stage}"
        if stage == 0:
            x = net.layer_norm(conv(x, f"{name}.0", n, k=4, stride=4), f"{name}.1")
        else:
            x = conv(net.layer_norm(x, f"{name}.0"), f"{name}.1", n, k=2, stride=2)
        for i in range(depth):                                             # x (B, H, W, C)
            name = f"detector.stages.{stage}.{i}"
            y = net.layer_norm(conv(x, f"{name}.dwconv", n, k=7, groups=n), f"{name}.norm")
            y = F.gelu(net.linear(y, f"{name}.pwconv1", 4 * n))
            size = y.square().sum((1, 2), keepdim=True).sqrt()             # global response normalisation
            gamma, beta = net.once(f"{name}.grn", x, lambda: [net.take(f"{name}.grn.{k}", 1, 1, 1, 4 * n) for k in ("gamma", "beta")])
            y = gamma * (y * size / (size.mean(-1, keepdim=True) + 1e-6)) + beta + y
            x = x + net.linear(y, f"{name}.pwconv2", n)
    x = net.layer_norm(x.mean((1, 2)), "detector.norm")
    return {head: net.linear(x, f"detector.fc_{head}", size) for head, size in HEADS.items()}


def to_motion(heads):
    """Raw heads -> motion (B, 70); an angle is the mean over 66 bins of 3 degrees."""
    bins = torch.arange(66, device=heads["exp"].device)
    angles = [3 * (heads[a].softmax(-1) * bins).sum(-1, keepdim=True) - 97.5 for a in ("pitch", "yaw", "roll")]
    return torch.cat([heads["exp"], heads["scale"], heads["t"], *angles], -1)


def dense_motion(net, f, x_s, x_d):
    """First half of W: where every voxel comes from (B, 16, 64, 64, 3), and which pixels the source hid (B, 1, 64, 64)."""
    name, axes = "dense_motion_network", [torch.linspace(-1, 1, n, device=f.device) for n in (64, 64, 16)]
    grid = torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1], -1)                 # (16, 64, 64, 3): x, y, z
    shift = F.pad(x_s - x_d, (0, 0, 1, 0))                                 # (B, 22, 3), first the background, unmoved

    def heatmap(x):                                                        # Gaussian around each point, by axis
        gx, gy, gz = (torch.exp(-50 * (axis - x[..., i, None]) ** 2) for i, axis in enumerate(axes))
        return torch.einsum("bkd,bkh,bkw->bkdhw", gz, gy, gx)

    c = F.relu(net.conv(f, f"{name}.compress", 4, k=1, norm=f"{name}.norm"))
    grids = (grid + shift[:, :, None, None, None]).flatten(1, 2)           # (B, 22 * 16, 64, 64, 3)
    sampled = F.grid_sample(c.float(), grids, align_corners=False).unflatten(2, (22, 16)).transpose(1, 2)
    heat = F.pad(heatmap(x_d) - heatmap(x_s), (0, 0, 0, 0, 0, 0, 1, 0))    # (B, 22, 16, 64, 64)
    x = torch.cat([heat[:, :, None], sampled], 2).flatten(1, 2)            # (B, 110, ...): 5 n + 0 is the heat of n

    glass, skips = f"{name}.hourglass", [x]
    for i, n in enumerate((64, 128, 256, 512, 1024)):
        block = f"{glass}.encoder.down_blocks.{i}"
        y = F.relu_(net.conv(skips[-1], f"{block}.conv", n, norm=f"{block}.norm"))
        skips.append(F.avg_pool2d(y.flatten(1, 2), 2).unflatten(1, (n, 16)))
    x = skips.pop()
    for i, n in enumerate((512, 256, 128, 64, 32)):
        block = f"{glass}.decoder.up_blocks.{i}"
        x = torch.cat([F.relu(net.conv(x, f"{block}.conv", n, norm=f"{block}.norm", up=2)), skips.pop()], 1)
    x = F.relu(net.conv(x, f"{glass}.decoder.conv", 142, norm=f"{glass}.decoder.norm"))
    m = net.conv(x, f"{name}.mask", 22, k=7).float().softmax(1)
    # sum_n m_n (grid - x_d + x_s)_n, and the m_n sum to 1
    deformation = grid + torch.einsum("bkdhw,bkc->bdhwc", m, shift)
    return deformation, net.conv(x.flatten(1, 2), f"{name}.occlusion", 1, k=7).sigmoid()


def warp(net, f, x_s, x_d):
    """W: f_s (B, 32, 16, 64, 64) and keypoints (B, 21, 3) -> warped feature (B, 256, 64, 64)."""
    deformation, occlusion = dense_motion(net, f, x_s, x_d)
    x = F.grid_sample(f.float(), deformation, align_corners=False).flatten(1, 2)
    x = F.leaky_relu(net.conv(x, "third.conv", 256, norm="third.norm"), 0.01)
    return net.conv(x, "fourth", 256, k=1) * occlusion


def spade(net, name, x, h):
    """The normalised x, scaled and shifted by what the warped feature h says; in place where memory allows."""
    a = net.conv(h, f"{name}.mlp_shared.0", 128, up=x.size(-1) // h.size(-1)).relu_()
    gamma, beta = (net.conv(a, f"{name}.mlp_{which}", x.size(1)) for which in ("gamma", "beta"))
    return beta.addcmul_(x, gamma.add_(1))                                 # x (1 + gamma) + beta


def spade_block(net, name, x, h, n):
    mid, normed = min(x.size(1), n), F.instance_norm(x)
    dx = net.conv(F.leaky_relu_(spade(net, f"{name}.norm_0", normed, h), 0.2), f"{name}.conv_0", mid)
    dx = F.instance_norm(dx)
    dx = net.conv(F.leaky_relu_(spade(net, f"{name}.norm_1", dx, h), 0.2), f"{name}.conv_1", n)
    if x.size(1) != n:
        x = net.conv(spade(net, f"{name}.norm_s", normed, h), f"{name}.conv_s", n, k=1, bias=False)
    return dx.add_(x)


def generate(net, h):
    """G: warped feature (B, 256, 64, 64) -> image (B, 3, 512, 512) in 0..1."""
    x = net.conv(h, "fc", 512)
    for i in range(6):
        x = spade_block(net, f"G_middle_{i}", x, h, 512)
    for i, n in enumerate((256, 64)):
        x = spade_block(net, f"up_{i}", F.interpolate(x, scale_factor=2.0), h, n)
    return F.pixel_shuffle(net.conv(F.leaky_relu(x, 0.2), "conv_img.0", 12), 2).sigmoid()


def stitching(net, x_s, x_d):
    """S: x_d (B, 21, 3) corrected so that the crop meets the picture without a seam."""
    o = torch.cat([x_s, x_d], 1).flatten(1)
    for i, n in enumerate((128, 128, 64)):
        o = F.relu(net.linear(o, f"mlp.{2 * i}", n))
    o = net.linear(o, "mlp.6", 65)
    return x_d + o[:, :63].unflatten(1, (21, 3)) + F.pad(o[:, None, 63:], (0, 1))


GET = "get it with: huggingface-cli download KwaiVGI/LivePortrait --local-dir pretrained_weights"

def keep_big_blocks():
    """glibc hands every large block back to the system and pays page faults for the next one; let it keep them.

    Worth a fifth of the time per frame on a CPU. Other C libraries have no mallopt and need none of this.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                                # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)                                        # M_TRIM_THRESHOLD: keep what is free


class LivePortrait:
    """LivePortrait with the public weights, from the folder that holds base_models; ValueError names what is wrong."""

    def __init__(self, weights_dir, device="cpu", dtype=None, compile=False):
        keep_big_blocks()
        root = Path(weights_dir)
        root = root / "liveportrait" if (root / "liveportrait").is_dir() else root
        self.device = torch.device(device)
        load = lambda file, dtype=None, part="": Weights(root / file, part, self.device, dtype or torch.float32)
        self.F = load("base_models/appearance_feature_extractor.pth")      # once per portrait: always float32
        self.M = load("base_models/motion_extractor.pth")
        self.W = load("base_models/warping_module.pth", dtype)
        self.G = load("base_models/spade_generator.pth", dtype)
        self.S = load("retargeting_models/stitching_retargeting_module.pth", part="retarget_shoulder")
        blank = lambda *shape: torch.empty(shape, device="meta")
        appearance(self.F, blank(1, 3, 256, 256)), motion_heads(self.M, blank(1, 3, 256, 256))
        warp(self.W, blank(1, 32, 16, 64, 64), blank(1, 21, 3), blank(1, 21, 3)), generate(self.G, blank(1, 256, 64, 64))
        stitching(self.S, blank(1, 21, 3), blank(1, 21, 3))
        for net in (self.F, self.M, self.W, self.G, self.S):
            net.done()
        self.render = torch.compile(self.render) if compile else self.render

    @torch.inference_mode()
    def source(self, image):
        """uint8 portrait crop (H, W, 3), or a batch (B, H, W, 3) -> Source with f_s, x_c (B, 63), motion (B, 70)."""
        images = np.asarray(image).reshape(-1, *np.shape(image)[-3:])
        small = np.stack([np.asarray(Image.fromarray(im).resize((256, 256), Image.BOX)) for im in images])
        x = torch.from_numpy(small).to(self.device).movedim(-1, 1) / 255
        heads = motion_heads(self.M, x)
        return Source(appearance(self.F, x), heads["kp"].cpu(), to_motion(heads).cpu())

    def render(self, f_s, x_s, x_d, stitch=True):
        """f_s (B, 32, 16, 64, 64) and keypoints (B, 21, 3) -> uint8 (B, 512, 512, 3)."""
        x_d = stitching(self.S, x_s, x_d) if stitch else x_d
        image = generate(self.G, warp(self.W, f_s, x_s, x_d))
        return (image.float().clamp(0, 1) * 255).byte().movedim(1, -1)     # truncated, as the reference does

    @torch.inference_mode()
    def frames(self, source, motion, stitch=True, batch=None):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3), rendered `batch` at a time."""
        batch = batch or (8 if self.device.type == "cuda" else 1)          # on a CPU larger ones only cost memory
        x_c = source.x_c.view(1, 21, 3)
        for part in torch.as_tensor(motion).split(batch):
            x_s, x_d = (keypoints(x_c, m).to(self.device).expand(len(part), -1, -1) for m in (source.motion, part))
            yield from self.render(source.f_s.expand(len(part), -1, -1, -1, -1), x_s, x_d, stitch).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------- a sketch

# where a made-up face has LivePortrait's 21 points
FACE = np.array([
    (0, -.40, 0), (-.14, -.16, -.08), (.14, -.16, -.08), (-.20, .08, -.05), (-.29, -.06, .10), (0, .75, .20),
    (0, .15, -.16), (.20, .08, -.05), (0, -.08, -.13), (0, .04, -.20), (.29, -.06, .10), (-.125, -.075, -.09),
    (0, .40, -.08), (-.125, -.035, -.09), (-.105, .205, -.11), (.125, -.075, -.09), (.125, -.035, -.09),
    (0, .185, -.15), (0, -.09, -.10), (0, .225, -.14), (.105, .205, -.11)])
PAINT = dict(shirt=(58, 92, 128), collar=(76, 114, 152), hair=(62, 43, 38), sheen=(86, 62, 54), skin=(242, 200, 172),
             shade=(226, 174, 146), blush=(240, 178, 158), line=(112, 70, 60), white=(252, 250, 246), iris=(64, 118, 136),
             pupil=(26, 24, 30), lip=(204, 104, 102), dark=(88, 28, 36), teeth=(250, 246, 240), tongue=(208, 104, 108))


def ring(centre, rx, ry, start=0.0, end=2.0):
    """Points (40, 3) of an ellipse around centre, from start to end in half turns, clockwise from the right."""
    angle = np.pi * np.linspace(start, end, 40)
    return np.array(centre) + np.stack([rx * np.cos(angle), ry * np.sin(angle), 0 * angle], 1)


def lens(left, right, top, bottom):
    """Closed outline (48, 3) between two curves that meet in the corners left and right; top and bottom are heights."""
    a = np.linspace(-1, 1, 24)[:, None]
    chord = left + (right - left) * (a + 1) / 2
    curve = lambda y: chord + (1 - np.abs(a) ** 2.2) * (0, y, 0)
    return np.concatenate([curve(top), curve(bottom)[::-1]])


class Sketch:
    """A drawn face for canonical keypoints laid out like FACE. Same two methods as LivePortrait, and no weights."""
    antialias = 2

    def __init__(self):
        n = SIZE * self.antialias
        shade = np.linspace((228, 236, 236), (178, 204, 208), n)[:, None]
        self.background = Image.fromarray(np.broadcast_to(shade, (n, n, 3)).astype(np.uint8))

    def source(self, image=None, x_c=FACE):
        """The face at rest; `image` is not looked at."""
        motion = torch.zeros(1, M)
        motion[:, SCALE], motion[:, 65] = 1.3, 0.1
        return Source(None, torch.as_tensor(x_c, dtype=torch.float32).reshape(1, 63), motion)

    def frames(self, source, motion, **unused):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3)."""
        x_c = source.x_c.reshape(21, 3).double().numpy()
        for m in torch.as_tensor(motion).double():
            image = self.background.copy()
            brush = ImageDraw.Draw(image)
            R, s, t = rotation(*m[ROT, None])[0].numpy(), m[SCALE].numpy(), m[TRANS].numpy() * (1, 1, 0)
            for points, paint in self.body():
                self.fill(brush, 1.3 * points + t * 0.6, paint)            # shoulders only drift along
            for points, paint in self.head(x_c, m[EXP].reshape(21, 3).numpy()):
                self.fill(brush, s * (points @ R) + t, paint)              # Eq. 3
            yield np.asarray(image.reduce(self.antialias))

    def fill(self, brush, points, paint):
        brush.polygon([tuple(p) for p in (points[:, :2] + 1) * SIZE / 2 * self.antialias], PAINT[paint])

    def body(self):
        yield ring((0, 1.08, 0), .62, .50), "shirt"
        yield ring((0, .62, 0), .20, .10), "collar"
        yield np.array([(-.12, .2, 0), (.12, .2, 0), (.15, .62, 0), (0, .69, 0), (-.15, .62, 0)]), "shade"

    def head(self, x_c, d):
        """Outlines (n, 3) with their paint, back to front; d (21, 3) are the expression offsets."""
        w, h = x_c[10, 0] / FACE[10, 0], x_c[12, 1] / FACE[12, 1]          # this identity's width and height
        jaw, side, smile = d[19, 1], d[19, 0], -(d[3, 1] + d[7, 1]) / 2
        yield ring((0, -.06 * h, .12), .345 * w, .42 * h), "hair"
        for x in (-.295 * w, .295 * w):
            yield ring((x, .02, .10), .045, .075), "shade"

        face = ring((0, 0, 0), .30 * w, .42 * h)                           # narrower and nearer towards the chin
        low = np.clip(face[:, 1:] / (.42 * h), 0, 1)[:, :1]
        face = face * (1, 1, 1) + low ** 2 * (.3 * side, .4 * jaw, -.06) + (1 - low) * (0, 0, .06)
        face[:, 0] *= 1 - .20 * low[:, 0] ** 3
        yield face, "skin"
        for x, cheek in ((-.19 * w, 3), (.19 * w, 7)):
            yield ring((x, x_c[cheek, 1] + .02 + 2 * d[cheek, 1], -.05), .055, .036), "blush"
        yield from self.eye(x_c, d, -1, 11, 13, 1)
        yield from self.eye(x_c, d, 1, 15, 16, 2)
        tip = x_c[9]
        yield lens(tip + (-.045, .045, .02), tip + (.045, .045, .02), -.01, .022), "shade"
        yield ring(tip + (.012, -.01, 0), .020, .045), "blush"
        yield from self.mouth(x_c, d, jaw, side)
        cap = ring((0, -.07 * h, .06), .318 * w, .41 * h, 1.0, 2.0)
        fringe = ring((0, -.07 * h, .06), .318 * w, .20 * h, 2.0, 1.0)
        fringe -= np.sin(np.pi * np.linspace(0, 1, 40))[:, None] * (.05 * w, 0, .10)
        yield np.concatenate([cap, fringe]), "hair"
        yield lens(np.array((-.2 * w, -.33 * h, -.05)), np.array((.02, -.42 * h, -.05)), -.03, .0), "sheen"

    def eye(self, x_c, d, x, upper, lower, brow):
        """x is -1 for the left one, with its upper lid, lower lid and brow points."""
        centre = (x_c[upper] + x_c[lower]) / 2
        opened = np.clip(1 - d[upper, 1] / .02, 0, 1.3)                    # blink: 20 thousandths shut it
        left, right = centre + (-.070, .004, .02), centre + (.070, .004, .02)
        if opened > .12:
            slit = lens(left, right, -.046 * opened, .028 * min(opened, 1) + d[lower, 1])
            yield slit, "white"
            iris = centre + (3 * d[upper, 0], -.006, 0)
            for size, paint in ((.033, "iris"), (.016, "pupil")):
                disc = ring(iris, size, size)
                disc[:, 1] = np.clip(disc[:, 1], slit[:24, 1].min() + .004, slit[24:, 1].max())
                yield disc, paint
            yield ring(iris + (-.010, -.012, 0), .007, .007), "white"
        lash = -.046 * opened if opened > .12 else .012
        yield lens(left - (.004, 0, 0), right + (.004, 0, 0), lash - .014, lash), "line"
        raised, frown = (d[1, 1] - d[2, 1]) / 2, (d[1, 0] - d[2, 0]) / 2
        inner, outer = x_c[brow] * (1, 1, 1), x_c[brow] * (1, 1, 1)
        inner = inner + (-x * (.065 + frown), .006 - raised * 1.6 + 2.2 * frown, 0)
        outer = outer + (x * .07, .012 - raised, .03)
        left, right = (outer, inner) if x < 0 else (inner, outer)
        yield lens(left, right, -.034, -.008), "hair"

    def mouth(self, x_c, d, jaw, side):
        pucker = np.clip(1 + 40 * d[17, 2] - 15 * d[20, 2], .55, 1.3)      # woo narrows, eee widens
        middle = (x_c[17] + x_c[19]) / 2
        left, right = ((x_c[k] - middle) * (pucker, 1, 1) + middle + (0, 1.5 * d[[14, 20], 1].mean(), 0) for k in (14, 20))
        top = x_c[17, 1] + d[17, 1] - left[1] + .012
        gap = max(jaw + .004, 0) * 1.15
        bottom = top + gap + .004
        lean = np.array((side, 0, 0))
        press = np.clip(-(jaw + .004) / .02, 0, 1)                         # lips pressed together are thin
        thick = .022 - .010 * press
        yield lens(left, right, top - thick, top + .006), "lip"
        yield lens(left, right + lean, bottom - .004, bottom + thick * 1.25), "lip"
        if gap > .006:
            inset = (right - left) * .08
            yield lens(left + inset, right - inset, top, bottom), "dark"
            if gap > .02:
                yield lens(left + 2 * inset, right - 2 * inset, top, top + min(.4 * gap, .02)), "teeth"
                yield lens(left + 3 * inset, right - 3 * inset, bottom - .35 * gap, bottom - .002), "tongue"
        else:
            yield lens(left, right, top + .001, top + .005), "dark"
