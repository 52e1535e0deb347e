"""common/memory.py: bytes on the device meta against sums by hand, and the figures of a guided image of DistDiff."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.memory import saved_bytes

GIB = 2**30


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=grad)


@pytest.fixture
def layers():
    """Ten square linear layers with a SiLU behind each; frozen."""
    with torch.device("meta"):
        return nn.Sequential(*[nn.Sequential(nn.Linear(100, 100), nn.SiLU()) for _ in range(10)]).requires_grad_(False)


def test_without_gradients_few_activations_live_at_once(layers):
    with torch.no_grad():
        counted = saved_bytes(lambda: layers(meta(5, 100)))
    # at the peak the input, what a pair of layers was given, and what each of the two makes; weights are not counted
    assert counted.held == 4 * 500 and counted.peak == 4 * 500 * 4


def test_a_graph_holds_what_its_backward_pass_needs(layers):
    x = meta(5, 100, grad=True)
    # frozen linear layers need their weights only, SiLU its input; the last output is the result
    assert saved_bytes(lambda: layers(x)).held == 4 * 500 * (10 + 1)
    layers.requires_grad_(True)
    assert saved_bytes(lambda: layers(x)).held == 4 * 500 * (10 + 10)  # and the inputs of layers 2 to 10, and x


def test_gradients_count_and_the_graph_goes(layers):
    x = meta(5, 100, grad=True)
    counted = saved_bytes(lambda: torch.autograd.grad(layers(x).sum(), x))
    assert counted.held == 4 * 500 and counted.peak > 4 * 500 * 11


def test_checkpointing_is_counted_as_it_runs(layers):
    x = meta(5, 100, grad=True)

    def work(each, *blocks):
        y = x
        for block in blocks:
            y = each(block, y)
        return torch.autograd.grad(y.sum(), x)

    def again(block, y):
        return checkpoint(block, y, use_reentrant=False)

    plain = saved_bytes(lambda: work(lambda block, y: block(y), layers)).peak
    assert saved_bytes(lambda: work(again, layers[:5], layers[5:])).peak < 0.8 * plain
    assert saved_bytes(lambda: work(again, layers)).peak >= plain  # all comes back at once, in the backward pass


def test_attention_is_fused():
    q = meta(2, 4, 1000, 16, grad=True)
    number = 2 * 4 * 1000 * 4
    assert saved_bytes(lambda: F.scaled_dot_product_attention(q, q, q)).held == number * (16 + 1)
    counted = saved_bytes(lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q))
    assert counted.peak < number * 16 * 6 < number * 1000
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention  # as it was


def test_autocast_has_the_dtypes_of_cuda():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(100, 100), nn.LayerNorm(100), nn.Linear(100, 100))
    x, seen = meta(5, 100, grad=True), []
    for layer in net:
        layer.register_forward_hook(lambda *inside: seen.append(inside[2].dtype))
    saved_bytes(lambda: net(x), autocast=True)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    net.requires_grad_(False)
    once, twice = (saved_bytes(lambda n=n: [net[0](x) for _ in range(n)], autocast=True).held for n in (1, 2))
    assert twice - once == 2 * 500  # the second time only the output: a weight is cast once
    assert net(x).dtype == torch.float32


@pytest.fixture(scope="module")
def sd14():
    """U-Net and VAE of Stable Diffusion 1.4; frozen."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    sides = dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(**sides, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=512)
    return unet.requires_grad_(False), vae.requires_grad_(False)


@pytest.mark.parametrize(
    ("dtype", "autocast", "checkpointing", "pair", "decode", "peak"),  # of the VAE; GiB kept by each part; of all
    [
        (torch.float32, True, False, 1.93, 4.77, 13.4),
        (torch.float32, True, True, 0.34, 0.62, 4.0),
        (torch.bfloat16, False, False, 1.44, 2.78, 8.5),
        (torch.bfloat16, False, True, 0.29, 0.40, 2.5),
    ],
)
def test_what_a_guided_image_of_distdiff_stores(sd14, dtype, autocast, checkpointing, pair, decode, peak):
    """An image at 512 pixels, two predictions: a gradient goes through two pairs of U-Net passes and two decodings."""
    unet, vae = sd14
    for network, kind in ((unet, torch.bfloat16), (vae, dtype)):
        network.to(kind).train(checkpointing)  # the stock networks checkpoint in training only
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()

    def both(z):
        return unet(torch.cat([z, z]).bfloat16(), meta(1), meta(2, 77, 768, dtype=torch.bfloat16)).sample

    def picture(z):
        return vae.decode(z.to(dtype)).sample

    def guided(z):
        x, energy = z, 0
        for _ in range(2):
            without, prompted = both(x).float().chunk(2)
            x = x - (without + 7.5 * (prompted - without))
            energy = energy + picture(x).float().mean()
        return torch.autograd.grad(energy, z)

    z = meta(1, 4, 64, 64, grad=True)
    kept = [saved_bytes(lambda work=work: work(z), autocast).held / GIB for work in (both, picture)]
    assert kept == pytest.approx([pair, decode], rel=0.03)
    assert saved_bytes(lambda: guided(z), autocast).peak / GIB == pytest.approx(peak, rel=0.03)
