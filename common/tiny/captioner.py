"""[6] captioner: GIT, a text decoder that reads the patches of CLIP's image tower."""

import json

import torch
import torch.nn.functional as F
from safetensors import safe_open

from common.tiny.clip import ClipWithHeads, load_all, vision_arguments, vision_state
from common.tiny.glyphs import full_caption, to_float
from common.tiny.tokenizer import CONTEXT, load_tokenizer
from common.tiny.training import batch, corpus, fit, half_folder


def train_captioner(job):
    """GitForCausalLM; the vision tower is CLIP's and stays as it is, only the decoder learns. Writes captioner/.

    A captioner trained from scratch learns the sentence and not the digit; CLIP's patches already hold the answer.
    """
    from transformers import CLIPImageProcessor, CLIPTokenizer, GitConfig, GitForCausalLM, GitProcessor

    images, attributes = corpus(job)
    settings = json.loads((job.out / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    end = settings["text_cfg"]["vocab_size"] - 1
    config = GitConfig(
        vision_config=vision_arguments(settings["vision_cfg"]),
        vocab_size=end + 1,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(job.seed)
    model = GitForCausalLM(config)
    with safe_open(job.out / "clip" / "open_clip_model.safetensors", "pt") as saved:
        clip = {k: saved.get_tensor(k).float() for k in saved.keys()}
    tower = ClipWithHeads(settings).clip
    tower.load_state_dict(clip)
    vision = model.git.image_encoder
    load_all(vision, vision_state(tower.visual, "vision_model." if hasattr(vision, "vision_model") else ""))
    vision.requires_grad_(False)

    tokens = load_tokenizer(job.out)
    texts = [full_caption(a) for a in attributes.tolist()]
    ids = tokens(texts).to(job.device)
    keep = (ids != end).sum(1).max() + 1  # longest caption and its end token
    ids = ids[:, :keep]
    mask = F.pad(ids != end, (1, 0), value=True)[:, :-1]  # keeps the end token that closes a caption, not the padding
    labels = ids.masked_fill(~mask, -100)

    def loss_at(step, g):
        i = batch(len(images), 64, g, job.device)
        x = to_float(images[i])
        return model(input_ids=ids[i], attention_mask=mask[i].long(), pixel_values=x, labels=labels[i]).loss

    notes = fit(job, "captioner", model, loss_at, lr=2e-3)
    half_folder(model.cpu(), job.out / "captioner")
    processor = GitProcessor(
        CLIPImageProcessor.from_pretrained(job.out / "clip_hf"),
        CLIPTokenizer.from_pretrained(job.out / "sd" / "tokenizer"),
    )
    processor.save_pretrained(job.out / "captioner")
    return notes
