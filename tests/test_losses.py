"""Equations 4 to 7 mean what they say."""
import torch

import train
from moda import ALSE, M, Config, MotionModel, draw, losses, sync_loss


class Fixed(torch.nn.Module):
    """A model that answers a given velocity."""
    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, *args):
        self.args = args
        return self.v


def batch(B=3, N=12):
    return dict(z0=torch.randn(B, N, M), audio=torch.randn(B, N, 1, 8), emotion=torch.arange(B), identity=torch.randn(B, 63),
                prev=torch.randn(B, M), mask=torch.ones(B, N, dtype=torch.bool), t=torch.rand(B), eps=torch.randn(B, N, M),
                drop_audio=torch.zeros(B, dtype=torch.bool), drop_emotion=torch.zeros(B, dtype=torch.bool))


def test_rectified_flow_and_velocity_loss_are_equations_4_and_5():
    b = batch()
    error = torch.randn(3, 12, M)
    rf, vel, sync = losses(Fixed(b["eps"] - b["z0"] + error), **b)
    first, second = error[:, 1:] - error[:, :-1], error[:, 2:] - 2 * error[:, 1:-1] + error[:, :-2]
    assert torch.allclose(rf, error.square().mean())
    assert torch.allclose(vel, first.square().mean() + second.square().mean())
    assert sync == 0


def test_masked_frames_do_not_enter_the_losses():
    b = batch()
    b["mask"][1, 5:] = False
    v = torch.randn(3, 12, M)
    before = losses(Fixed(v.clone()), **b)
    v[1, 5:], b["z0"][1, 5:] = 100.0, -50.0
    assert torch.equal(torch.stack(before), torch.stack(losses(Fixed(v), **b)))


def test_a_dropped_emotion_is_none_and_dropout_has_the_papers_rates():
    b = batch()
    b["drop_emotion"][1] = True
    model = Fixed(b["eps"])
    losses(model, **b)
    assert model.args[3].tolist() == [0, 8, 2]
    drawn = draw(Config(), 20_000, 1, torch.Generator().manual_seed(0))
    assert abs(drawn["drop_audio"].float().mean() - 0.5) < 0.02
    assert abs(drawn["drop_emotion"].float().mean() - 0.1) < 0.01


def test_the_expert_is_gated_clip_by_clip():
    """Eq. 7: only clips whose sync loss is below tau count, and none whose voice was dropped."""
    b = batch()
    expert = ALSE(Config(width=16, heads=1, audio_layers=1, audio_dim=8))
    clean = b["z0"]                                                          # t v is subtracted exactly
    each = sync_loss(*expert(b["audio"], clean, b["mask"]), b["mask"])
    tau = each.sort().values[:2].mean().item()                               # between the best and the second clip
    model = Fixed(b["eps"] - b["z0"])
    assert torch.allclose(losses(model, **b, expert=expert, tau=tau)[2], each.min() / 3, atol=1e-5)
    b["drop_audio"][each.argmin()] = True
    assert losses(model, **b, expert=expert, tau=tau)[2] == 0


def test_the_expert_judges_by_its_own_statistics():
    """It learned from other data than the model: what reaches it is motion in LivePortrait units."""
    b, model = batch(), MotionModel(Config())
    expert = ALSE(Config(width=16, heads=1, audio_layers=1, audio_dim=8))
    z, plain = b.pop("z0"), expert(b["audio"], b["eps"], b["mask"])[1]
    model.mean[:], model.std[:], expert.mean[:], expert.std[:] = 1.0, 2.0, -3.0, 5.0
    assert torch.allclose(expert(b["audio"], expert.denormalise(b["eps"]), b["mask"])[1], plain, atol=1e-3)
    each = sync_loss(*expert(b["audio"], model.denormalise(z), b["mask"]), b["mask"])
    gained = train.objective(model, Fixed(b["eps"] - z), expert, 99, motion=model.denormalise(z), **b)
    assert torch.allclose(gained[2], each.mean(), atol=1e-4)


def test_in_bfloat16_no_certainty_costs_infinitely_much():
    a = torch.nn.functional.normalize(torch.rand(1, 4, 8), dim=-1).bfloat16()
    for in_sync in True, False:
        assert sync_loss(a, a, torch.ones(1, 4), in_sync).isfinite().all()


def test_the_expert_learns_sync_and_tells_shifts_apart():
    expert, rng = ALSE(Config(width=32, heads=1, audio_layers=1, audio_dim=18)), torch.Generator().manual_seed(1)
    optimizer, mask = torch.optim.Adam(expert.parameters(), 3e-3), torch.ones(8, 40, dtype=torch.bool)
    from moda import LIPS
    for step in range(80):
        z = torch.randn(8, 40, M, generator=rng)
        loss = expert.pretraining_loss(z[..., None, LIPS], z, mask, shift=5 + step % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a, m = expert(z[..., None, LIPS], z, mask)
    assert (a * m).sum(-1).mean() > 0.8 and (a.roll(4, 1) * m).sum(-1).mean() < 0.4
