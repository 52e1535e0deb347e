"""The Hugging Face hub: what a repository holds, here in the cache or there, and fetching files of it."""

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from common.files import disk_full
from common.launch import UserError
from common.modelfiles import KEY_FILE, names_in, needed

SECONDS = 5.0  # how long the hub may take to answer before it counts as unreachable


def commit(repo: str) -> str:
    """The revision of a repository in the cache, "" for none."""
    ref = _cache_folder(repo) / "refs" / "main"
    return ref.read_text().strip() if ref.is_file() else ""


def folder(repo: str) -> Path | None:
    """Its folder in the cache, in which files may be missing."""
    found = _cache_folder(repo) / "snapshots" / (commit(repo) or "none")
    return found if found.is_dir() else None


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


@cache
def info(repo: str) -> Any:
    """The hub's description of a repository, or the exception it answered with, within SECONDS."""
    from huggingface_hub import HfApi

    answer = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(repo, timeout=SECONDS))
        except Exception as error:
            answer.append(error)

    # A thread, because a name server that does not answer blocks longer than any time-out of the HTTP client.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return answer[0] if answer else TimeoutError(f"no answer in {SECONDS:.0f} s")


def cached(repo: str, kind: str, file: str = "") -> Path | None:
    """The folder of a repository in the cache, if all is there that loading this kind reads (or just that file)."""
    if (found := folder(repo)) is None:
        return None
    try:
        there = (found / file).is_file() if file else needed(names_in(found), kind, repo, found.joinpath)
        return found if there else None
    except UserError:
        return None


def names(repo: str, kind: str, shown: str, file: str = "", alternatives: str = "try a local folder") -> set[str]:
    """All file names of a repository on the hub, with the key file of this kind (or that file) among them.

    shown: how the user called it. Raises UserError when it does not exist, lacks the file, or cannot be asked.
    """
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    found = info(repo)
    if not isinstance(found, Exception):
        all_names = {sibling.rfilename for sibling in found.siblings or ()}
        if file and file not in all_names:
            raise UserError(f"{kind}: {shown} has no safetensors weights on the hub (no {file} in {repo})")
        if not file and KEY_FILE[kind] not in all_names:
            raise UserError(f"{shown} on the hub has no {KEY_FILE[kind]}, so it is no {kind}; {alternatives}")
        return all_names
    if isinstance(found, GatedRepoError):
        raise UserError(f"{kind}: {shown} asks to accept its licence on its hub page, then `hf auth login`")
    if isinstance(found, RepositoryNotFoundError):
        raise UserError(f"{kind}: {shown} is not on the hub (or private); {alternatives}")
    why = f"the hub cannot be reached ({(str(found).strip() or type(found).__name__).splitlines()[0]})"
    if isinstance(found, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set"
    what = "some of its files are" if folder(repo) else f"{repo} is" if repo != shown else "it is"
    raise UserError(
        f"{kind}: {shown}: {what} not in the local cache, and {why}; {alternatives} "
        f"(where there is a network: `hf download {repo} --local-dir FOLDER`; then give FOLDER)"
    )


def fetch(repo: str, kind: str, file: str = "") -> Path:
    """The folder of a repository in the cache, with all that loading this kind reads (or that file), downloaded if need
    be; processes that do so together wait for each other. Raises UserError for what cannot be had."""
    from huggingface_hub import snapshot_download

    def download(*files: str) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(files)))

    if found := cached(repo, kind, file):
        return found
    there = names(repo, kind, repo, file)
    try:
        files = [file] if file else needed(there, kind, f"{kind}: {repo}", lambda name: download(name) / name)
        if os.environ.get("RANK", "0") == "0":
            print(f"downloading {repo}: {len(files)} files", flush=True)
        return download(*files)
    except UserError:
        raise
    except Exception as error:
        if disk_full(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{repo} cannot be downloaded ({said}); run the same command again") from error
