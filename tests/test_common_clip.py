"""common/clip.py on small random models of the stock open_clip classes; one test loads the shipped tiny CLIP."""

import gzip
import multiprocessing

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from common import clip as C
from common.launch import UserError

SIZE, CONTEXT, DIM = 32, 16, 24
MERGES = [("s", "e"), ("v", "e"), ("n", "</w>"), ("t", "h"), ("th", "e</w>"), ("d", "i")]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


VOCABULARY = 512 + len(MERGES) + 2


def model_config(vocab_size=VOCABULARY, **vision):
    return {
        "embed_dim": DIM,
        "quick_gelu": False,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **vision},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2},
    }


@pytest.fixture
def bpe_file(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    # no newline at the end: open_clip would read it as one more merge
    path.write_bytes(gzip.compress(("#version\n" + "\n".join(f"{a} {b}" for a, b in MERGES)).encode()))
    return path


@pytest.fixture
def folder(tmp_path, bpe_file):
    """A random CLIP with its own vocabulary of 520 tokens, written by save_clip."""
    torch.manual_seed(0)
    config = model_config()
    model = open_clip.CLIP(**config)
    C.save_clip(tmp_path / "m", model.state_dict(), config, [bpe_file], {"mean": MEAN, "std": STD})
    return tmp_path / "m"


@pytest.fixture
def clip(folder):
    return C.load_clip(str(folder))


def pictures(n=7, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(40, 60), (50, 33), (32, 32), (20, 24), (64, 64), (90, 31), (33, 100)]
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)) for i in range(n)]


def test_save_and_load_keep_every_bit(clip, folder, tmp_path):
    for dtype in (torch.float32, torch.float16):
        stored = {k: v.to(dtype) for k, v in clip.model.state_dict().items()}
        again = tmp_path / f"again-{dtype}"
        C.save_clip(again, stored, clip.config, clip.tokenizer_files, clip.preprocess_config)
        loaded = C.load_clip(str(again))
        assert loaded.config == clip.config and (loaded.mean, loaded.std) == (tuple(MEAN), tuple(STD))
        assert [f.read_bytes() for f in loaded.tokenizer_files] == [f.read_bytes() for f in clip.tokenizer_files]
        for name, tensor in loaded.model.state_dict().items():
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, stored[name].float()), name


def test_stock_open_clip_reads_the_folder(clip, folder):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image = pictures(1)[0]
    assert torch.equal(preprocess(image), clip.preprocess(image))
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(image)[None])
    assert torch.equal(C.encode_images(clip, [image]), expected)


def test_the_folder_brings_its_own_tokenizer(clip):
    tokens = clip.tokenize(["the seven", "the " * 40])
    assert tokens.shape == (2, CONTEXT)
    assert tokens.max() == VOCABULARY - 1  # the end token is the last of this vocabulary, not 49,407
    assert tokens[0, 1] == 512 + MERGES.index(("th", "e</w>"))


def test_texts_are_encoded_once_in_order(clip):
    texts = ["the seven", "a dog", "the seven", "one", "a dog", "the seven"]
    seen = []
    stock = clip.tokenize
    clip.tokenize = lambda batch: seen.extend(batch) or stock(batch)
    features = C.encode_texts(clip, texts, batch=2)
    assert seen == ["the seven", "a dog", "one"]
    assert features.shape == (6, DIM) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[4])
    with torch.no_grad():
        alone = torch.cat([clip.model.encode_text(stock([t])) for t in texts])
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-5)
    assert C.encode_texts(clip, []).shape == (0, DIM)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_images_in_order_for_any_batch_size(clip, batch):
    images = pictures(7)
    with torch.no_grad():
        alone = torch.cat([clip.model.encode_image(clip.preprocess(i)[None]) for i in images])
    features = C.encode_images(clip, images, batch=batch, workers=3)
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # or any order would pass


@pytest.mark.parametrize("height, width", [(SIZE, SIZE), (48, 40), (20, 20)])
def test_tensor_and_pil_images_agree(clip, height, width):
    pixels = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    assert torch.equal(C.encode_images(clip, pixels, batch=2), C.encode_images(clip, images, batch=2))
    with pytest.raises(ValueError, match="uint8"):
        C.encode_images(clip, pixels.float())


def test_preprocess_is_resize_crop_normalise(clip):
    image = pictures(1)[0]  # 60 wide, 40 high -> 48 x 32 -> the middle 32 x 32
    small = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(clip.preprocess(image), expected, rtol=0, atol=1e-6)


def test_a_bad_image_stops_the_encoding(clip):
    class Images:
        def __len__(self):
            return 50

        def __getitem__(self, i):
            if i == 30:
                raise UserError("cannot read x/30.png")
            return pictures(1)[0]

    for workers in (0, 2):
        with pytest.raises(UserError, match="30.png"):
            C.encode_images(clip, Images(), batch=4, workers=workers)
    assert not multiprocessing.active_children()  # no worker is left behind


def test_training_mode_survives(clip):
    clip.model.train()
    C.encode_texts(clip, ["one"])
    assert clip.model.training
    clip.model.eval()
    C.encode_texts(clip, ["one"])
    assert not clip.model.training


def test_zero_shot_weights(clip):
    names, templates = ["seven", "cup {of} tea", "the dog"], ["a photo of a {}.", "the {}", "{} {{"]
    with pytest.raises(ValueError, match="class name"):
        C.zero_shot_weights(clip, names, ["a photo"])
    templates[2] = "{} seen"
    weights = C.zero_shot_weights(clip, names, templates)
    assert weights.shape == (3, DIM)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(3))
    one = [
        C.encode_texts(clip, [t])[0] for t in ("a photo of a cup {of} tea.", "the cup {of} tea", "cup {of} tea seen")
    ]
    mean = sum(v / v.norm() for v in one) / 3
    torch.testing.assert_close(weights[1], mean / mean.norm(), rtol=0, atol=1e-6)


def test_bf16_keeps_the_logit_scale(folder):
    clip = C.load_clip(str(folder), dtype=torch.bfloat16)
    full = C.load_clip(str(folder))
    assert clip.dtype == torch.bfloat16 and clip.model.logit_scale.dtype == torch.float32
    a, b = C.encode_images(clip, pictures(3)), C.encode_images(full, pictures(3))
    assert a.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.99
    a, b = C.encode_texts(clip, ["one", "two"]), C.encode_texts(full, ["one", "two"])
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.99


def test_a_resnet_image_tower_loads_too(tmp_path, bpe_file):
    config = model_config(layers=[1, 1, 1, 1], width=8, head_width=16)
    del config["vision_cfg"]["patch_size"]
    C.save_clip(tmp_path / "rn", open_clip.CLIP(**config).state_dict(), config, [bpe_file])
    clip = C.load_clip(str(tmp_path / "rn"))
    assert C.encode_images(clip, pictures(3)).shape == (3, DIM)


def test_bad_folders(folder, tmp_path):
    def error(path):
        with pytest.raises(UserError) as caught:
            C.load_clip(str(path))
        return str(caught.value)

    (folder / "bpe.txt.gz").rename(folder / "merges")  # the stock tokenizer has more tokens than the text tower
    assert "49408 tokens" in error(folder)
    (folder / "merges").rename(folder / "bpe.txt.gz")

    state = open_clip.CLIP(**model_config(width=48)).state_dict()
    C.save_clip(tmp_path / "other", state, model_config(), [folder / "bpe.txt.gz"])
    assert "do not fit" in error(tmp_path / "other")
    (folder / "second-bpe.txt.gz").write_bytes((folder / "bpe.txt.gz").read_bytes())
    assert "keep one" in error(folder)
    assert "no such folder" in error(tmp_path / "missing" / "x")


def test_the_tiny_clip_loads():
    clip = C.load_clip("tiny")
    assert clip.image_size == 32
    weights = C.zero_shot_weights(clip, ["three", "seven"], ["a photo of a {}"])
    assert weights.shape == (2, clip.config["embed_dim"])
    assert clip.tokenize(["a photo of a seven"]).max() == clip.config["text_cfg"]["vocab_size"] - 1
    features = C.encode_images(clip, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert torch.isfinite(features).all() and torch.equal(features[0], features[1])
