"""[1] tokenizer: one byte-pair vocabulary, written in the forms of transformers and of open_clip."""

import gzip
import random
from collections import Counter

import torch

from common.tiny.glyphs import caption, pictures
from common.tiny.training import write_atomic

CONTEXT = 24  # tokens in a prompt; the longest caption of glyphs.py has 21


def learn_merges(words, limit):
    """Byte-pair encoding in CLIP's alphabet. words: Counter of words -> at most `limit` pairs, most frequent first."""
    from open_clip.tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    spelled = Counter()
    for word, count in words.items():
        letters = [alphabet[b] for b in word.encode()]
        spelled[(*letters[:-1], letters[-1] + "</w>")] += count
    merges, known = [], set()
    while len(merges) < limit:
        pairs = Counter()
        for letters, count in spelled.items():
            for pair in zip(letters, letters[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        # Trap: two pairs can spell the same token; the vocabulary must hold it once or the ids of the two forms part.
        if left + right not in known:
            merges.append((left, right))
            known.add(left + right)
        merged = Counter()
        for letters, count in spelled.items():
            out, i = [], 0
            while i < len(letters):
                step = 2 if letters[i : i + 2] == (left, right) else 1
                out.append("".join(letters[i : i + step]))
                i += step
            merged[tuple(out)] += count
        spelled = merged
    return merges


def make_tokenizer(job):
    """Learn the merges from captions; write sd/tokenizer (CLIPTokenizer) and clip/bpe.txt.gz (SimpleTokenizer)."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    _, attributes = pictures(8000, f"{job.seed}/tokenizer")
    rng = random.Random(job.seed)
    words = Counter(w for a in attributes.tolist() for w in caption(a, rng).replace(",", " ,").split())
    for word in EXTRA_WORDS.split():
        words[word] += 30
    merges = learn_merges(words, 500)

    # Trap: open_clip reads one merge more when the file ends with a newline. mtime=0: the same bytes each time.
    text = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges)
    write_atomic(job.out / "clip" / "bpe.txt.gz", lambda path: path.write_bytes(gzip.compress(text.encode(), mtime=0)))
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(job.out / "sd" / "tokenizer")
    tokenizer.save_pretrained(job.out / "clip_hf")


# Words of the scripts' prompts that the captions lack: whole tokens, so that any prompt fits into the context.
EXTRA_WORDS = """rendering cropped clean dirty dark my cool close up bright jpeg corrupted good one large nice weird
handwritten hand drawn written digit digits number image class centered type of the in and with realistic drawing style
low resolution pixelated sketch art painting texture satellite"""


def load_tokenizer(out):
    """The CLIPTokenizer of sd/ -> function list[str] -> int64 ids [n, CONTEXT], padded with the end token."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(out / "sd" / "tokenizer")
    pad = dict(padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    return lambda texts: tokenizer(list(texts), **pad).input_ids


def caption_table(job, attributes, write, copies):
    """Token ids of `copies` captions per picture -> (unique ids [u, CONTEXT], index [n, copies] into them)."""
    rng, index, rows = random.Random(f"{job.seed}/{write.__name__}"), {}, []
    for a in attributes.tolist():
        rows.append([index.setdefault(write(a, rng), len(index)) for _ in range(copies)])
    return load_tokenizer(job.out)(index).to(job.device), torch.tensor(rows, device=job.device)
