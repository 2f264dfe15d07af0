"""The network is the paper's: its size, its fusion stages, its rotation, and no frame that does not count."""
import pytest
import torch

from moda import Config, JointBlock, MoDA, rotate, split_heads, waves


def rope(n, dim):
    return waves(torch.arange(n), dim, 256.0)


def n_parameters(cfg):
    with torch.device("meta"):
        model = MoDA(cfg)
    return sum(p.numel() for p in model.parameters()) - model.null_audio.numel()


def test_the_paper_counts_370M_and_904M_parameters():
    assert n_parameters(Config()) == 372_983_878
    assert n_parameters(Config(fusion="four")) == 904_421_446                # w/o C2F: 21 four-stream blocks


@pytest.mark.parametrize("wrong", [dict(width=30), dict(width=36, heads=4), dict(fusion="late")])
def test_a_network_that_cannot_be_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match="even multiple of heads, fusion one of c2f, four, cross"):
        MoDA(Config(**wrong))


def inputs(B=2, N=20):
    return dict(z=torch.randn(B, N, 70), t=torch.rand(B), audio=torch.randn(B, N, 1, 160),
                emotion=torch.arange(B) % 9, identity=torch.randn(B, 63), prev=torch.randn(B, 70))


def perturbed(**kwargs):
    model = MoDA(Config(width=32, heads=2, n_four=1, n_two=1, n_one=2, audio_layers=1, audio_dim=160, **kwargs)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("fusion", ["c2f", "four", "cross"])
@pytest.mark.parametrize("rope_streams", [2, 4])
def test_a_masked_frame_never_contributes(fusion, rope_streams):
    model, x = perturbed(fusion=fusion, rope_streams=rope_streams), inputs()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    v = model(**x, mask=mask)
    x["z"][1, 12:], x["audio"][1, 12:] = 9.0, -7.0
    assert torch.equal(model(**x, mask=mask)[mask], v[mask])
    short = {k: y[1:, :12] if k in ("z", "audio") else y[1:] for k, y in x.items()}
    assert torch.allclose(model(**short)[0], v[1, :12], atol=1e-5)           # as if the clip had ended there


def test_one_joint_attention_for_any_number_of_streams():
    """Two streams with the same weights are one long stream whose second part counts from 0 again."""
    cfg = Config(width=32, heads=2)
    two, one = JointBlock(cfg, 2), JointBlock(cfg, 1)
    for ours, theirs in ((two.qkv, one.qkv), (two.out, one.out), (two.mlp, one.mlp)):
        for part in ours:
            part.load_state_dict(theirs[0].state_dict())
    x, mods, table = torch.randn(3, 24, 32), torch.randn(6, 3, 1, 32), rope(14, 16)
    a, b = two([x[:, :10], x[:, 10:]], mods.repeat(2, 1, 1, 1), table)
    assert torch.allclose(torch.cat([a, b], 1), one([x], mods, torch.cat([table[:10], table]))[0], atol=1e-5)


def test_one_token_stands_for_all_equal_ones():
    """Unrotated emotion and identity tokens (the released four-stream stage) are equal, and one replaces all N."""
    model, x = perturbed(rope_streams=2), inputs()
    prev, a, e, i, table = model.conditions(x["audio"], x["emotion"], x["identity"], x["prev"])
    assert e.shape == i.shape == (2, 1, 32)
    assert torch.equal(rotate(e, rope(1, 32)), e)                            # its position, 0, is not turned
    still, mods = table[:1].expand_as(table), model.modulations(x["t"], x["emotion"])
    alone = model.fuse(x["z"], (prev, a, e, i, still), mods)
    copies = model.fuse(x["z"], (prev, a, e.expand(-1, 20, -1), i.expand(-1, 20, -1), still), mods)
    assert torch.allclose(alone, copies, atol=1e-5)


def test_rotation_depends_on_the_distance_of_frames_only():
    q, k, table = torch.randn(16), torch.randn(16), rope(30, 16)
    score = lambda i, j: rotate(q[None], table[i:i + 1])[0] @ rotate(k[None], table[j:j + 1])[0]
    assert torch.allclose(score(3, 7), score(20, 24), atol=1e-4)
    assert torch.allclose(score(5, 5), q @ k, atol=1e-4)


def test_every_condition_is_heard(tiny):
    x = inputs()
    v = tiny(**x)
    for name in x:
        changed = dict(x, **{name: x[name].flip(0)})
        assert not torch.allclose(tiny(**changed), v, atol=1e-4), name
    everything_dropped = tiny(**x, drop_audio=torch.ones(2, dtype=torch.bool))
    assert torch.equal(everything_dropped, tiny(**dict(x, audio=0 * x["audio"]), drop_audio=torch.ones(2, dtype=torch.bool)))


def test_attention_starts_on_the_diagonal():
    """At initialisation a motion frame listens most to its own moment in every stream."""
    cfg = Config(width=128, heads=2)
    block = JointBlock(cfg, 1)
    q, k, _ = split_heads(block.qkv[0](torch.randn(64, 40, 128)), block.qk_gain[0], rope(40, 64))
    score = (q @ k.mT).mean((0, 1))
    assert (score.argmax(1) == torch.arange(40)).float().mean() > 0.9
