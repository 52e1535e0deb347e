"""[4] unet: text-conditional noise prediction on latents."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.tiny.clip import WIDTH
from common.tiny.glyphs import caption, plain_caption, to_float
from common.tiny.tokenizer import caption_table, load_tokenizer
from common.tiny.training import batch, corpus, fit, half_folder, write_atomic
from common.tiny.vae import SCALING

# Stable Diffusion's noise schedule, shared by training and the shipped DDIM sampler.
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def latents(job, images):
    """Mean and standard deviation of every picture's scaled latent -> float [n, 8, 8, 8]; cached in the work folder."""
    from diffusers import AutoencoderKL

    file = job.work / "latents.safetensors"
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(job.out / "sd" / "vae", dtype=torch.float32).to(job.device).eval()
        parts = []
        with torch.no_grad():
            for i in tqdm(range(0, len(images), 200), desc="latents", unit="200 pictures"):
                posterior = vae.encode(to_float(images[i : i + 200])).latent_dist
                parts.append(torch.cat([posterior.mean, posterior.std], 1).cpu() * SCALING)
        write_atomic(file, lambda path: save_file({"latents": torch.cat(parts)}, path))
    with safe_open(file, "pt", device=job.device) as saved:
        return saved.get_tensor("latents")


def train_unet(job):
    """UNet2DConditionModel with cross-attention at both resolutions, so that prompts bind; writes the sd/ pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    sd = job.out / "sd"
    images, attributes = corpus(job)
    z = latents(job, images)
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder", dtype=torch.float32).to(job.device).eval()

    @torch.no_grad()
    def states(ids):
        return torch.cat([encoder(part).last_hidden_state for part in ids.split(500)])

    tables = []  # (states of the distinct captions [u, CONTEXT, WIDTH], rows of each picture [n, 3]): encoded once
    for write in (plain_caption, caption):
        ids, rows = caption_table(job, attributes, write, copies=3)
        tables.append((states(ids), rows))
    empty = states(load_tokenizer(job.out)([""]).to(job.device))
    torch.manual_seed(job.seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # Trap: diffusers reads this as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )
    unet.to(memory_format=torch.channels_last)  # a third faster on the CPU
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.to(job.device)
    # Min-SNR-5: with plain noise loss most of the gradient goes to steps where the digit is long decided.
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr

    def cycle(name, lr, ema, detailed, power):
        """One run of `fit`. detailed: share of captions that name more than the digit; t = 1000 u^power, u uniform."""

        def loss_at(step, g):
            i = batch(len(z), 64, g, job.device)
            draw = torch.randn(2, 64, 4, 8, 8, generator=g).to(job.device)
            x, noise = z[i, :4] + z[i, 4:] * draw[0], draw[1]  # the posterior is drawn afresh at each step
            t = (1000 * torch.rand(64, generator=g) ** power).long().to(job.device)
            captions, rows = tables[int(torch.rand(1, generator=g) < detailed)]
            h = captions[rows[i, torch.randint(0, rows.shape[1], (1,), generator=g).item()]]
            drop = torch.rand(64, 1, 1, generator=g) < 0.1  # classifier-free guidance needs the empty prompt
            a = alphas[t][:, None, None, None]
            h = torch.where(drop.to(job.device), empty, h)
            predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, h).sample
            return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

        return fit(job, name, unet.requires_grad_(True), loss_at, lr=lr, ema=ema)

    # Each cycle starts from the averaged weights of the one before. Samples that show the prompted class: 92.5 % after
    # the first, 94.2 % after the second, 97.1 % after the third, which has more noise (where the digit is decided) and
    # more captions of the digit alone. (In the shipped weights it started from the half-precision files of the second.)
    parts = [
        cycle("unet", lr=1e-3, ema=0.999, detailed=0.6, power=1.0),
        cycle("polish", lr=5e-4, ema=0.998, detailed=0.6, power=1.0),
        cycle("refine", lr=7e-4, ema=0.998, detailed=0.5, power=0.7),
    ]
    notes = {k: sum(part[k] for part in parts) for k in ("steps", "seconds")}
    notes |= {"loss": parts[-1]["loss"], "curve": parts[0]["curve"]}
    half_folder(unet.cpu(), sd / "unet")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(sd / "vae"),
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(sd / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler.save_pretrained(sd / "scheduler")
    pipe.save_config(sd)  # model_index.json; the parts are written already
    return notes
