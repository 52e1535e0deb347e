"""[3] clip: a patch-8 ViT and a 2-layer text transformer."""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from common.tiny.glyphs import COLOUR_NAMES, NAMES, QUALITIES, SIZES, STYLES, caption, to_float
from common.tiny.tokenizer import CONTEXT, caption_table, load_tokenizer
from common.tiny.training import batch, corpus, fit, half_folder, write_atomic, write_json

WIDTH = 64  # text width = CLIP embedding width: Real-Fake writes an image embedding into a text slot


def clip_config(vocabulary):
    """open_clip's model configuration. A ViT, because DataDream puts LoRA on the attention of both towers."""
    vision = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": WIDTH, "heads": 2, "layers": 2}
    return {"embed_dim": WIDTH, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text}


class ClipWithHeads(nn.Module):
    """open_clip's CLIP and the linear heads of the supervised start, one per attribute of a picture."""

    def __init__(self, config):
        super().__init__()
        import open_clip

        self.clip = open_clip.CLIP(**config)
        sizes = [len(v) for v in (NAMES, STYLES, COLOUR_NAMES, COLOUR_NAMES, SIZES, QUALITIES)]
        self.heads = nn.ModuleList(nn.Linear(config["embed_dim"], n) for n in sizes)


def train_clip(job):
    """Contrastive training after a supervised start; writes clip/, clip_hf/ and the pipeline's text encoder.

    A ViT trained from scratch stays at chance for hundreds of contrastive steps. Heads that read the picture's
    attributes from its embedding get it going; their weight falls to a tenth when the captions come in.
    """
    images, attributes = corpus(job)
    ids, rows = caption_table(job, attributes, caption, copies=3)
    short_ids = torch.stack([load_tokenizer(job.out)([t.format(n) for n in NAMES]) for t in SHORT_TEMPLATES])
    short_ids = short_ids.to(job.device)  # [templates, 10, CONTEXT]
    config = clip_config(len(json.loads((job.out / "clip_hf" / "tokenizer.json").read_text())["model"]["vocab"]))
    torch.manual_seed(job.seed)
    model = ClipWithHeads(config)
    clip, start = model.clip, job.steps("clip") // 4

    def loss_at(step, g):
        i = batch(len(images), 128, g, job.device)
        shift = torch.randint(-2, 3, (2,), generator=g).tolist()
        x = torch.roll(to_float(images[i]), shift, (2, 3))
        embedding = clip.encode_image(x)
        heads = [F.cross_entropy(head(embedding), attributes[i, k]) for k, head in enumerate(model.heads)]
        supervised = heads[0] + 0.3 * sum(heads[1:])
        if step < start:
            return supervised
        f = F.normalize(embedding, dim=-1)
        scale = clip.logit_scale.exp().clamp(max=50)
        if step % 2:  # captions with the digit alone: every picture against the ten classes
            t = clip.encode_text(short_ids[step // 2 % len(short_ids)], normalize=True)
            return F.cross_entropy(scale * f @ t.T, attributes[i, 0]) + 0.1 * supervised
        column = torch.randint(0, rows.shape[1], (1,), generator=g).item()
        unique, target = rows[i, column].unique(return_inverse=True)  # several pictures may share one caption
        logits = scale * f @ clip.encode_text(ids[unique], normalize=True).T  # [B, u]
        owners = F.one_hot(target, len(unique)).float().T
        text_loss = -(owners / owners.sum(1, keepdim=True) * logits.T.log_softmax(1)).sum(1).mean()
        return 0.5 * (F.cross_entropy(logits, target) + text_loss) + 0.1 * supervised

    notes = fit(job, "clip", model, loss_at, lr=1e-3, weight_decay=0.05)
    write_clip(job.out, clip.float().cpu(), config)
    return notes


SHORT_TEMPLATES = ["a photo of a {}", "a photo of the digit {}", "photo of {}", "the digit {}"]
SHORT_TEMPLATES += ["a picture of the number {}", "an image of a {}", "{}", "a {}"]
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def write_clip(out, clip, config):
    """One set of weights in three forms: open_clip folder, CLIPModel folder, the pipeline's text encoder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

    half = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(out / "clip" / "open_clip_model.safetensors", lambda path: save_file(half, path))
    write_json(out / "clip" / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": PREPROCESS})

    # hidden_act gelu is open_clip's quick_gelu false; the end token is the last of the vocabulary.
    see, read, end = config["vision_cfg"], config["text_cfg"], config["text_cfg"]["vocab_size"] - 1
    text = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=read["layers"],
        num_attention_heads=read["heads"],
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = CLIPVisionConfig(**vision_arguments(see))
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    state = {
        "logit_scale": clip.logit_scale,
        "text_projection.weight": clip.text_projection.T,
        "visual_projection.weight": clip.visual.proj.T,
        **text_state(clip, "text_model."),
        **vision_state(clip.visual, "vision_model."),
    }
    load_all(model, state)
    half_folder(model, out / "clip_hf")
    size = {"height": see["image_size"], "width": see["image_size"]}
    mean, std = PREPROCESS["mean"], PREPROCESS["std"]
    processor = CLIPImageProcessor(do_center_crop=False, size=size, image_mean=mean, image_std=std)
    processor.save_pretrained(out / "clip_hf")

    encoder = CLIPTextModel(text)
    load_all(encoder, text_state(clip, "text_model." if hasattr(encoder, "text_model") else ""))
    half_folder(encoder, out / "sd" / "text_encoder")


def vision_arguments(see):
    """open_clip's vision_cfg in the words of transformers' CLIPVisionConfig and GitVisionConfig."""
    return dict(
        hidden_size=see["width"],
        intermediate_size=4 * see["width"],
        num_hidden_layers=see["layers"],
        num_attention_heads=see["width"] // see["head_width"],
        image_size=see["image_size"],
        patch_size=see["patch_size"],
        hidden_act="gelu",
        projection_dim=WIDTH,
    )


def load_all(model, state):
    """load_state_dict that accepts nothing but position buffers to be missing."""
    state = {k: v.detach().clone() for k, v in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("position_ids")]
    if missing or unexpected:
        raise RuntimeError(f"{type(model).__name__}: missing {missing}, unexpected {unexpected}; another version?")


def _block_state(blocks, prefix):
    """Transformer blocks of open_clip -> keys of transformers' CLIP; in_proj is split into q, k and v."""
    state = {}
    for i, block in enumerate(blocks):
        at = f"{prefix}encoder.layers.{i}."
        projections = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
        for letter, weight, bias in projections:
            state |= {f"{at}self_attn.{letter}_proj.weight": weight, f"{at}self_attn.{letter}_proj.bias": bias}
        parts = {"self_attn.out_proj": block.attn.out_proj, "layer_norm1": block.ln_1, "layer_norm2": block.ln_2}
        parts |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        for name, part in parts.items():
            state |= {f"{at}{name}.weight": part.weight, f"{at}{name}.bias": part.bias}
    return state


def text_state(clip, prefix):
    """open_clip's text tower as the state of transformers' text model."""
    return {
        f"{prefix}embeddings.token_embedding.weight": clip.token_embedding.weight,
        f"{prefix}embeddings.position_embedding.weight": clip.positional_embedding,
        f"{prefix}final_layer_norm.weight": clip.ln_final.weight,
        f"{prefix}final_layer_norm.bias": clip.ln_final.bias,
        **_block_state(clip.transformer.resblocks, prefix),
    }


def vision_state(visual, prefix):
    """open_clip's ViT as the state of transformers' CLIP or GIT vision model (the misspelt key is theirs)."""
    return {
        f"{prefix}embeddings.class_embedding": visual.class_embedding,
        f"{prefix}embeddings.patch_embedding.weight": visual.conv1.weight,
        f"{prefix}embeddings.position_embedding.weight": visual.positional_embedding,
        f"{prefix}pre_layrnorm.weight": visual.ln_pre.weight,
        f"{prefix}pre_layrnorm.bias": visual.ln_pre.bias,
        f"{prefix}post_layernorm.weight": visual.ln_post.weight,
        f"{prefix}post_layernorm.bias": visual.ln_post.bias,
        **_block_state(visual.transformer.resblocks, prefix),
    }
