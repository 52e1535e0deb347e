"""[2] vae: 32x32x3 to 8x8x4."""

import torch
import torch.nn.functional as F

from common.tiny.glyphs import to_float
from common.tiny.training import batch, corpus, fit, half_folder

SCALING = 0.18215  # Stable Diffusion's latent factor; the VAE is rescaled to make it right


def train_vae(job):
    """AutoencoderKL, squared error plus a light KL term; latents then scaled to unit variance at factor 0.18215."""
    from diffusers import AutoencoderKL

    images, _ = corpus(job)
    torch.manual_seed(job.seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=SCALING,
    )

    def loss_at(step, g):
        x = to_float(images[batch(len(images), 32, g, job.device)])
        latents = vae.encode(x).latent_dist
        noise = torch.randn(latents.mean.shape, generator=g).to(job.device)
        output = vae.decode(latents.mean + latents.std * noise).sample
        return F.mse_loss(output, x) + 0.1 * F.l1_loss(output, x) + 2e-4 * latents.kl().mean() / latents.mean[0].numel()

    notes = fit(job, "vae", vae, loss_at, lr=2e-3, weight_decay=0.0, ema=0.995)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_float(images[i : i + 200])).latent_dist.mean for i in range(0, 2000, 200)])
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        # Whitening folded into the two 1x1 convolutions: with SD's factor the latents have mean 0 and variance 1.
        gain = 1 / (std * SCALING)
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:4] *= gain[:, None, None, None]
        quant.bias[:4] = (quant.bias[:4] - mean) * gain
        quant.bias[4:] += 2 * gain.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight /= gain[:, None, None, None].transpose(0, 1)
    half_folder(vae, job.out / "sd" / "vae")
    return notes
