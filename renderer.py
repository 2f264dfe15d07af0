"""From motion to pictures: keypoints (Eq. 3), LivePortrait's networks, and a Sketch face that needs no weights.

Letters: B images, T frames; x_c (21, 3) canonical keypoints, x right, y down, z inward, the image spans -1..1.
Motion is in LivePortrait units: 63 expression offsets, scale, translation, pitch, yaw, roll in degrees.
"""
import ctypes
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from moda import EXP, M, ROT, SCALE, TRANS, explained, read_tensors, require

SIZE = 512                                         # pixels of a rendered frame, height and width
GET = "get it with: hf download KwaiVGI/LivePortrait --local-dir pretrained_weights"
BATCH_NORM = "running_mean", "running_var", "weight", "bias"
# M_MMAP_MAX and M_TRIM_THRESHOLD: glibc keeps large blocks; to give them back each time, and pay for their pages anew,
# costs a sixth of the time on a CPU
keep_blocks = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
keep_blocks(-4, 0), keep_blocks(-1, 2**31 - 1)
# a portrait, split: appearance f_s (B, 32, 16, 64, 64), canonical keypoints x_c (B, 63), motion (B, 70)
Source = namedtuple("Source", "f_s x_c motion")

def rotation(pitch, yaw, roll):
    """Degrees (...) each -> (..., 3, 3), the transpose of Rz Ry Rx: keypoints are row vectors, x_c R."""
    (cp, sp), (cy, sy), (cr, sr) = ((a.cos(), a.sin()) for a in map(torch.deg2rad, (pitch, yaw, roll)))
    return torch.stack([cy * cr, cy * sr, -sy,
                        sp * sy * cr - cp * sr, sp * sy * sr + cp * cr, sp * cy,
                        cp * sy * cr + sp * sr, cp * sy * sr - sp * cr, cp * cy], -1).unflatten(-1, (3, 3))

def keypoints(x_c, motion):
    """Eq. 3: x = s (x_c R + delta) + t, t_z = 0; x_c (B, 21, 3) or (B, 63), motion (B, 70) -> (B, 21, 3)."""
    delta = motion[:, EXP].unflatten(-1, (-1, 3))
    t = motion[:, None, TRANS] * motion.new_tensor([1, 1, 0])
    return motion[:, SCALE, None] * (x_c.reshape(-1, 21, 3) @ rotation(*motion[:, ROT].T) + delta) + t

def relative(motion, portrait, neutral):
    """Driving motion (T, 70), from its `neutral` pose and expression, put on the `portrait`'s own, (70,) each."""
    R = rotation(*motion[:, ROT].T) @ rotation(*neutral[ROT]).mT @ rotation(*portrait[ROT])
    angles = R[:, 1, 2].atan2(R[:, 2, 2]), -R[:, 0, 2].clamp(-1, 1).asin(), R[:, 0, 1].atan2(R[:, 0, 0])
    moved = portrait + motion - neutral
    scale = portrait[SCALE] * motion[:, SCALE] / neutral[SCALE]
    return torch.cat([moved[:, EXP], scale, moved[:, TRANS], torch.rad2deg(torch.stack(angles, 1))], 1)

def checked(motion):
    """motion as float32 (T, 70); ValueError if it is anything else."""
    motion = torch.as_tensor(motion)
    fine = motion.shape[1:] == (M,) and len(motion) and motion.isfinite().all()
    require(fine, f"motion of shape {tuple(motion.shape)}: expected finite numbers of shape (frames, {M})")
    return motion.detach().float()

# ------------------------------------------------------------------------------------------------------------- pictures
def read_image(path):
    """Any picture Pillow reads, upright and on white where it is transparent -> RGB Image. ValueError if it is none."""
    with explained(path, "no picture could be read", "take another"):
        image = ImageOps.exif_transpose(Image.open(path))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")

def crop_box(image, crop=""):
    """The square to animate as x, y, size: "x,y,size" in pixels of the picture, or the largest in its centre."""
    size = min(image.size)
    crop = crop or f"{(image.width - size) // 2},{(image.height - size) // 2},{size}"
    with explained(f"crop {crop}", f"no square x,y,size in {image.width} x {image.height} pixels", "name another"):
        x, y, size = map(int, crop.split(","))
        require(0 <= x <= image.width - size and 0 <= y <= image.height - size and size >= 16, "outside or below 16")
    return x, y, size

def paste_back(frames, image, box, longest=1280):
    """Frames blended into the whole picture, shrunk to `longest` and even sides, over a feathered edge."""
    zoom = min(1, longest / max(image.size))
    x, y, size = (int(v * zoom) for v in box)
    picture = image.resize([int(n * zoom) // 2 * 2 for n in image.size])
    outside = np.maximum(np.abs(np.arange(SIZE) - SIZE / 2) - 240, 0)      # pixels beyond the square 16..496
    fit = lambda array: Image.fromarray(array.astype(np.uint8)).resize((size, size), Image.BILINEAR)
    mask = fit(255 * np.clip(1 - np.hypot(outside, outside[:, None]) / 16, 0, 1))
    for frame in frames:
        whole = picture.copy()
        whole.paste(fit(frame), (x, y), mask)
        yield np.asarray(whole)

# -------------------------------------------------------------------------------------------------------- LivePortrait
# Five frozen networks, each a function of its file's weights: no gradients. An image is (B, 3, H, W) in 0..1, a volume
# (B, C, 16, H, W); everything is padded with zeros, and upsampled by repeating pixels.

class Weights:
    """The weights of one file, ready for `network`. A dry run of it on meta tensors of `shapes` looks every key up,
    checks its shape and folds what can be folded; nothing may be left over. ValueError names the file and the key."""

    def __init__(self, path, tensors, network, *shapes, advice=GET, device="cpu", dtype=torch.float32):
        self.path, self.advice, self.device, self.dtype, self.ready = path, advice, torch.device(device), dtype, {}
        # the file of S holds two networks more
        self.tensors = {k.removeprefix("module.").removeprefix("detector."): t
                        for k, t in tensors.get("retarget_shoulder", tensors).items() if "num_batches_tracked" not in k}
        network(self, *(torch.empty(shape, device="meta") for shape in shapes))
        require(not self.tensors, f"{path}: {next(iter(self.tensors), '')} does not belong there; {advice}")

    def take(self, key, *shape):
        if f"{key}_orig" in self.tensors:                                  # spectral norm: A / u^T A v, as stored
            A = self.take(f"{key}_orig", *shape)
            return A / (self.take(f"{key}_u", len(A)) @ A.flatten(1) @ self.take(f"{key}_v", A[0].numel()))
        found = tuple(self.tensors[key].shape) if key in self.tensors else "missing"
        require(found == shape, f"{self.path}: {key} is {found}, expected {shape}; {self.advice}")
        return self.tensors.pop(key).detach().float()

    def once(self, name, x, make):
        """The tensors that `make` prepares for layer `name` in the dry run, where x is."""
        if name not in self.ready:
            layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if self.device.type == "cuda" else {}
            self.ready[name] = [t.to(self.device, self.dtype, memory_format=layouts.get(t.ndim)) for t in make()]
        return [t.to(x.device) for t in self.ready[name]]

    def plain(self, name, x, **shapes):
        return self.once(name, x, lambda: [self.take(f"{name}.{key}", *shape) for key, shape in shapes.items()])

    def linear(self, x, name, n):
        return F.linear(x, *self.plain(name, x, weight=(n, x.size(-1)), bias=(n,)))

    def layer_norm(self, x, name, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], *self.plain(name, x, weight=x.shape[-1:], bias=x.shape[-1:]), eps=eps)

    def conv(self, x, name, n, k=3, norm="", up=1, stride=0, groups=1, bias=True):
        """Nearest upsampling by `up`, convolution to n channels, BatchNorm `norm`; padded, unless with a `stride`."""
        def make():
            weight = self.take(f"{name}.weight", n, x.size(1) // groups, *[k] * (x.ndim - 2))
            b = self.take(f"{name}.bias", n) if bias else torch.zeros(n)
            if norm:
                mean, var, scale, shift = (self.take(f"{norm}.{key}", n) for key in BATCH_NORM)
                weight, b = torch.nn.utils.fuse_conv_bn_weights(weight, b, mean, var, 1e-5, scale, shift)
            return (spread(weight, up) if up > 1 else weight), b
        stride, padding = ([stride], [0]) if stride else ((1, up, up)[2 - x.ndim:], [k // 2])
        # of one, two or three dimensions, plain or transposed: dilation 1, transposed, output padding 0
        return torch.convolution(x.to(self.dtype), *self.once(name, x, make), stride, padding, [1], up > 1, [0], groups)

    def block(self, x, name, n, up=1):
        return F.relu_(self.conv(x, f"{name}.conv", n, norm=f"{name}.norm", up=up))

def spread(weight, up):
    """`weight` after upsampling by `up`, as one transposed convolution: 16 products, not 36, for up = 2, 36 for 144."""
    weight = weight.flip(tuple(range(2, weight.ndim))).transpose(0, 1)
    return F.avg_pool3d(F.pad(weight, [up - 1] * 4), (1, up, up), stride=1) * up ** 2

def appearance(net, image):
    """F: image (B, 3, 256, 256) -> feature volume f_s (B, 32, 16, 64, 64)."""
    x = net.block(image, "first", 64)
    for i, n in enumerate((128, 256)):
        x = F.avg_pool2d(net.block(x, f"down_blocks.{i}", n), 2)
    x = net.conv(x, "second", 512, k=1).unflatten(1, (32, 16))             # flat channel = 16 c + depth
    for name in [f"resblocks_3d.3dr{i}" for i in range(6)]:                # x + conv2 relu norm2 conv1 relu norm1 x
        y = F.batch_norm(x, *net.plain(f"{name}.norm1", x, **dict.fromkeys(BATCH_NORM, (32,))))
        y = net.conv(F.relu(y), f"{name}.conv1", 32, norm=f"{name}.norm2")
        x = x + net.conv(F.relu(y), f"{name}.conv2", 32)
    return x

def motion_heads(net, image):
    """M, a ConvNeXt V2: image (B, 3, 256, 256) -> dict of raw heads."""
    conv = lambda x, *args, **options: net.conv(x.movedim(-1, 1), *args, **options).movedim(1, -1)
    x = net.layer_norm(conv(image.movedim(1, -1), "downsample_layers.0.0", 96, k=4, stride=4), "downsample_layers.0.1")
    for s, (n, depth) in enumerate(((96, 3), (192, 3), (384, 9), (768, 3))):
        x = conv(net.layer_norm(x, f"downsample_layers.{s}.0"), f"downsample_layers.{s}.1", n, 2, stride=2) if s else x
        for name in [f"stages.{s}.{i}" for i in range(depth)]:
            y = net.layer_norm(conv(x, f"{name}.dwconv", n, k=7, groups=n), f"{name}.norm")
            y = F.gelu(net.linear(y, f"{name}.pwconv1", 4 * n))
            size = y.norm(dim=(1, 2), keepdim=True)                        # global response normalisation
            gamma, beta = net.plain(f"{name}.grn", x, gamma=(1, 1, 1, 4 * n), beta=(1, 1, 1, 4 * n))
            y = y + gamma * (y * size / (size.mean(-1, keepdim=True) + 1e-6)) + beta
            x = x + net.linear(y, f"{name}.pwconv2", n)
    x = net.layer_norm(x.mean((1, 2)), "norm")
    sizes = dict(kp=63, exp=63, scale=1, t=3, pitch=66, yaw=66, roll=66)
    return {head: net.linear(x, f"fc_{head}", n) for head, n in sizes.items()}

def to_motion(heads):
    """Raw heads -> motion (B, 70); an angle is the mean over 66 bins, -97.5 to 97.5 degrees."""
    deg = lambda bins: bins.softmax(-1) @ torch.linspace(-97.5, 97.5, 66, device=bins.device)[:, None]
    return torch.cat([heads["exp"], heads["scale"], heads["t"], *(deg(heads[a]) for a in ("pitch", "yaw", "roll"))], -1)

def dense_motion(net, f, x_s, x_d):
    """Where every voxel comes from (B, 16, 64, 64, 3), and the occlusion, how much of each is seen (B, 1, 64, 64)."""
    name, axes = "dense_motion_network", [torch.linspace(-1, 1, n, device=f.device) for n in (16, 64, 64)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)     # (16, 64, 64, 3): x, y, z
    shift = F.pad(x_s - x_d, (0, 0, 1, 0))                                 # (B, 22, 3), first the background, unmoved
    # exp(-|grid - x|^2 / 0.02), a product of three
    heat = lambda x: torch.einsum("bnd,bnh,bnw->bndhw", *(
        torch.exp(-50 * (axis - x[..., 2 - i, None]) ** 2) for i, axis in enumerate(axes)))
    c = F.relu(net.conv(f, f"{name}.compress", 4, k=1, norm=f"{name}.norm"))
    # the grid has its end points, yet is read as if it had none (align_corners): so the weights were trained
    sampled = F.grid_sample(c.float(), (grid + shift[:, :, None, None, None]).flatten(1, 2), align_corners=False)
    heatmaps = F.pad(heat(x_d) - heat(x_s), (0, 0, 0, 0, 0, 0, 1, 0))      # (B, 22, 16, 64, 64)
    # the hourglass; the keypoints stay side by side: of its 110 channels 5 n + 0 is the heat of n
    skips = [torch.cat([heatmaps[:, :, None], sampled.unflatten(2, (22, 16)).transpose(1, 2)], 2).flatten(1, 2)]
    for i, n in enumerate((64, 128, 256, 512, 1024)):
        x = net.block(skips[-1], f"{name}.hourglass.encoder.down_blocks.{i}", n)
        skips.append(F.avg_pool2d(x.flatten(1, 2), 2).unflatten(1, (n, 16)))           # avg_pool3d knows no bfloat16
    x = skips.pop()
    for i, n in enumerate((512, 256, 128, 64, 32)):
        x = torch.cat([net.block(x, f"{name}.hourglass.decoder.up_blocks.{i}", n, up=2), skips.pop()], 1)
    x = net.block(x, f"{name}.hourglass.decoder", 142)
    m = net.conv(x, f"{name}.mask", 22, k=7).float().softmax(1)
    deformation = grid + torch.einsum("bndhw,bnc->bdhwc", m, shift)        # sum_n m_n (grid + shift_n), sum_n m_n = 1
    return deformation, net.conv(x.flatten(1, 2), f"{name}.occlusion", 1, k=7).sigmoid()

def warp(net, f, x_s, x_d):
    """W: f_s (B, 32, 16, 64, 64) and keypoints (B, 21, 3) -> warped feature (B, 256, 64, 64)."""
    deformation, occlusion = dense_motion(net, f, x_s, x_d)
    x = F.grid_sample(f.float(), deformation, align_corners=False).flatten(1, 2)
    x = F.leaky_relu(net.conv(x, "third.conv", 256, norm="third.norm"), 0.01)
    return net.conv(x, "fourth", 256, k=1) * occlusion

def spade(net, name, x, h):
    """x, normalised, (1 + gamma) + beta, both made from the warped feature h. In place to spare memory."""
    a = F.relu_(net.conv(h, f"{name}.mlp_shared.0", 128, up=x.size(-1) // h.size(-1)))
    gamma, beta = (net.conv(a, f"{name}.mlp_{which}", x.size(1)) for which in ("gamma", "beta"))
    return beta.addcmul_(F.instance_norm(x), gamma.add_(1))

def spade_block(net, name, x, h, n):
    """skip + conv_1 lrelu spade_1 conv_0 lrelu spade_0 x, to n channels."""
    dx = net.conv(F.leaky_relu_(spade(net, f"{name}.norm_0", x, h), 0.2), f"{name}.conv_0", min(x.size(1), n))
    dx = net.conv(F.leaky_relu_(spade(net, f"{name}.norm_1", dx, h), 0.2), f"{name}.conv_1", n)
    skip = x if x.size(1) == n else net.conv(spade(net, f"{name}.norm_s", x, h), f"{name}.conv_s", n, k=1, bias=False)
    return dx.add_(skip)

def generate(net, h):
    """G: warped feature (B, 256, 64, 64) -> image (B, 3, 512, 512)."""
    x = net.conv(h, "fc", 512)
    for i in range(6):
        x = spade_block(net, f"G_middle_{i}", x, h, 512)
    for i, n in enumerate((256, 64)):
        x = spade_block(net, f"up_{i}", F.interpolate(x, scale_factor=2.0), h, n)
    return F.pixel_shuffle(net.conv(F.leaky_relu(x, 0.2), "conv_img.0", 12), 2).sigmoid()

def stitching(net, x_s, x_d):
    """S: x_d (B, 21, 3) corrected so that the crop meets the picture without a seam."""
    o = net.linear(torch.cat([x_s, x_d], 1).flatten(1), "mlp.0", 128)
    for i, n in ((2, 128), (4, 64), (6, 65)):
        o = net.linear(F.relu(o), f"mlp.{i}", n)
    return x_d + o[:, :63].unflatten(1, (21, 3)) + F.pad(o[:, None, 63:], (0, 1))    # o[63:]: one shift in x and y

class LivePortrait:
    """LivePortrait with the public weights, from the folder that holds base_models; ValueError names what is wrong."""

    def __init__(self, weights_dir, device="cpu", dtype=torch.float32):
        self.device = torch.device(device)
        root = next(Path(weights_dir).glob("liveportrait/"), Path(weights_dir))
        require("animals" not in root.name, f"{root}: these networks know animals only; {GET}")

        def load(file, network, *shapes, **options):
            return Weights(root / file, read_tensors(root / file, GET), network, *shapes, device=device, **options)
        self.F = load("base_models/appearance_feature_extractor.pth", appearance, (1, 3, 256, 256))
        self.M = load("base_models/motion_extractor.pth", motion_heads, (1, 3, 256, 256))
        self.W = load("base_models/warping_module.pth", warp, (1, 32, 16, 64, 64), (1, 21, 3), (1, 21, 3), dtype=dtype)
        self.G = load("base_models/spade_generator.pth", generate, (1, 256, 64, 64), dtype=dtype)
        self.S = load("retargeting_models/stitching_retargeting_module.pth", stitching, (1, 21, 3), (1, 21, 3))

    def source(self, image):
        """uint8 portrait crop (H, W, 3), or a batch (B, H, W, 3) -> Source with f_s, x_c (B, 63), motion (B, 70)."""
        x = torch.tensor(image, device=self.device).view(-1, *np.shape(image)[-3:]).movedim(-1, 1)
        x = (F.adaptive_avg_pool2d(x.float(), 256) + 0.5).floor() / 255    # the means of 2 x 2, as uint8
        heads = motion_heads(self.M, x)
        return Source(appearance(self.F, x), heads["kp"].cpu(), to_motion(heads).cpu())

    def render(self, f_s, x_s, x_d, stitch=True):
        """f_s (B, 32, 16, 64, 64) and keypoints (B, 21, 3) -> uint8 (B, 512, 512, 3), truncated as in the reference."""
        x_d = stitching(self.S, x_s, x_d) if stitch else x_d
        return (generate(self.G, warp(self.W, f_s, x_s, x_d)).float() * 255).byte().movedim(1, -1)

    def frames(self, source, motion, stitch=True, batch=None):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3), rendered `batch` at a time."""
        x_s = keypoints(source.x_c, source.motion).to(self.device)
        # on a CPU larger batches gain little and cost memory
        for part in checked(motion).split(batch or (8 if self.device.type == "cuda" else 1)):
            f_s, still = (t.expand(len(part), *t.shape[1:]) for t in (source.f_s, x_s))
            yield from self.render(f_s, still, keypoints(source.x_c, part).to(self.device), stitch).cpu().numpy()

# ----------------------------------------------------------------------------------------------------------- a sketch
# where a made-up face has LivePortrait's 21 points, x, y and z in percent, and which are each other's mirror image
FACE = np.array([[0, -14, 14, -20, -29, 0, 0, 20, 0, 0, 29, -12.5, 0, -12.5, -10.5, 12.5, 12.5, 0, 0, 0, 10.5],
                 [-40, -16, -16, 8, -6, 75, 15, 8, -8, 4, -6, -7.5, 40, -3.5, 20.5, -7.5, -3.5, 18.5, -9, 22.5, 20.5],
                 [0, -8, -8, -5, 10, 20, -16, -5, -13, -20, 10, -9, -8, -9, -11, -9, -9, -15, -10, -14, -11]]).T / 100
TWIN = [0, 2, 1, 7, 10, 5, 6, 3, 8, 9, 4, 15, 12, 16, 20, 11, 13, 17, 18, 19, 14, 23, 22, 21]   # then right, down, left
# a drawing enlarges y (3 point + 1) of brows, whose points move in opposite senses, of lids and corners of the mouth;
# and turns depth (3 point + 2) into the mouth's width, since rounded lips are narrow and spread ones wide
GAIN = torch.eye(M)
GAIN.diagonal()[[4, 7, 34, 46, 43, 61]] = torch.tensor([-3.0, 3, 3, 3, 1.5, 3])
GAIN[[53, 62, 53, 62], [42, 42, 60, 60]] = torch.tensor([-3.0, 1, 3, -1])

def outline(paint, *corners):
    """Colour, n corners "point,% right,% down" -> colour, closed spline (8 n, 24): weights of points and axes."""
    point, right, down = np.array([corner.split(",") for corner in corners], float).T
    corners = np.column_stack([np.eye(21)[point.astype(int)], right / 100, down / 100, 0 * down]).repeat(8, 0)
    return f"#{paint}", sum((8 - abs(k)) / 64 * np.roll(corners, k, 0) for k in range(-7, 8))

# from back to front, two a line: ear, face; white of the eye, iris; pupil, lid; lash, inside of the mouth; teeth, upper
# lip; brow, hair; lower lip, nose. The mirror image is drawn too, so half will do of what crosses the middle
HEAD = [outline(*words.split()) for words in """
    #e2ae92 4,-10,-10 4,6,0 4,0,24 #f2c8ac 4,-3,-10 0,-24,0 0,24,0 19,11,24 19,-11,24 3,-3,26 4,-2,16
    #fcfaf6 13,-9,-2 13,-4.5,-7 13,4.5,-7 13,9,-2 13,4.5,3 13,-4.5,3 #407688 13,-4,-6 13,4,-6 13,4,2 13,-4,2
    #1a181e 13,-2,-4 13,2,-4 13,2,0 13,-2,0 #f2c8ac 11,-12,5 11,-11,-13 11,11,-13 11,12,5 11,5,-1 11,-5,-1
    #70463c 11,-11,4.4 11,-5,-2.2 11,5,-2.2 11,11,4.4 11,5,-0.2 11,-5,-0.2 #581c24 14,-1,0 17,0,0 20,1,0 19,8,0 19,-8,0
    #faf6f0 17,-7,-1 17,7,-1 17,6,3 17,-6,3 #cc6866 14,-3,0 17,-5,-3 17,0,-1.4 17,5,-3 20,3,0 17,5,1.8 17,-5,1.8
    #3e2b26 1,-11,3 1,-4,-3 1,9,-1 1,9,3 1,-4,0 #3e2b26 4,-3,6 4,-9,-20 0,-22,-14 0,20,-13 0,20,6 0,-16,12 4,0,-10
    #cc6866 14,-2,0 19,-6,-2.2 19,6,-2.2 20,2,0 19,6,3 19,-6,3 #e2ae92 9,-2,-8 9,2,-8 9,3,5 9,-6,4""".split("#")[1:]]

# behind them, at twice the size: a wall, shoulders, neck
SCENE = ImageOps.colorize(Image.linear_gradient("L"), "#e4ecec", "#b2ccd0").resize((2 * SIZE, 2 * SIZE))
ImageDraw.Draw(SCENE).ellipse((160, 790, 864, 1400), "#3a5c80")
ImageDraw.Draw(SCENE).ellipse((417, 600, 607, 905), "#e2ae92")

class Sketch:
    """A face drawn, at twice the size, for keypoints laid out like FACE. Same methods as LivePortrait, no weights."""

    def source(self, image=None, x_c=FACE):
        """The face at rest, its motion zero but for scale, t_x, t_y; `image` is not looked at."""
        return Source(None, torch.as_tensor(x_c).float().reshape(1, 63), F.pad(torch.tensor([[1.3, 0, 0.1]]), (63, 4)))

    def frames(self, source, motion, **unused):
        """(T, 70) in LivePortrait units -> iterator of uint8 (512, 512, 3)."""
        motion = checked(motion) @ GAIN
        axes = motion[:, SCALE, None] * rotation(*motion[:, ROT].T)[:, :2]
        for frame in torch.cat([keypoints(source.x_c, motion), axes, -axes[:, :1]], 1)[..., :2].numpy():     # (24, 2)
            image = SCENE.copy()
            for paint, curve in HEAD:
                for side in (frame, frame[TWIN]):
                    ImageDraw.Draw(image).polygon(list((curve @ side + 1).ravel() * SIZE), paint)
            yield np.asarray(image.reduce(2))
