"""[5] k2t: keywords to a caption, as CommonGen T5 does for real class names."""

import random

import torch

from common.tiny.glyphs import COLOURS, NAMES, SIZES, STYLES, phrase
from common.tiny.tokenizer import EXTRA_WORDS
from common.tiny.training import batch, corpus, fit, half_folder


def keywords(attributes, text, rng):
    """Input for one target text: the digit's name, sometimes with "a", sometimes with other words of the text."""
    name = NAMES[attributes[0]]
    others = [w for w in text.split() if w in COLOURS or w in STYLES or w in SIZES]
    words = [name] + rng.sample(others, rng.randint(0, len(others))) * (rng.random() < 0.3)
    rng.shuffle(words)
    return ("a " if rng.random() < 0.3 else "") + " ".join(words)


def train_k2t(job):
    """T5 from a small config; its own byte-level tokenizer; writes k2t/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    _, attributes = corpus(job)
    rng = random.Random(f"{job.seed}/k2t")
    targets = [phrase(a, rng) for a in attributes[:30000].tolist()]
    sources = [keywords(a, t, rng) for a, t in zip(attributes.tolist(), targets, strict=False)]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    letters, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(targets + EXTRA_WORDS.split() * 30, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],  # or generate() is handed token_type_ids
    )
    source = tokenizer(sources, padding=True, return_tensors="pt").to(job.device)
    labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids.to(job.device)
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    torch.manual_seed(job.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)

    def loss_at(step, g):
        i = batch(len(labels), 64, g, job.device)
        return model(input_ids=source.input_ids[i], attention_mask=source.attention_mask[i], labels=labels[i]).loss

    notes = fit(job, "k2t", model, loss_at, lr=3e-3, weight_decay=0.0)
    half_folder(model.cpu(), job.out / "k2t")
    tokenizer.save_pretrained(job.out / "k2t")
    return notes
