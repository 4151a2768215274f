"""Runs on the Hugging Face hub, by addresses such as ``hf://owner/name``."""

from __future__ import annotations

import re
from pathlib import Path

from prism_meta.errors import PrismError, one_line
from prism_meta.training.cleanup.file import CLEANUP
from prism_meta.training.folder.weights import WEIGHTS

#: How an address begins.
SCHEME = "hf://"
#: What is downloaded: text, and weights in a format that holds numbers only. Nothing of it can run.
SAFE_FILES = ("config.toml", "run.json", "metrics.jsonl", CLEANUP, f"{WEIGHTS}/*.safetensors")
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?/?")


def download_run(address: str) -> Path:
    """Download a run from the hub, or find it in the hub's cache.

    Args:
        address: ``hf://owner/name``, or ``hf://owner/name@revision`` for a branch, tag or commit.

    Returns:
        The run folder, in the cache.

    Raises:
        PrismError: the address has another form, huggingface_hub is not installed, there is no such
            repository, it holds no run, or the hub cannot be reached.

    Example:
        >>> download_run("hf://owner")
        Traceback (most recent call last):
        ...
        prism_meta.errors.PrismError: hf://owner: expected hf://owner/name, or hf://owner/name@revision
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise PrismError(f"{address}: expected hf://owner/name, or hf://owner/name@revision")
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise PrismError(
            f"{address}: needs huggingface_hub, which is not installed; run pip install 'prism-meta[hub]'"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(
            match["repository"], revision=match["revision"], allow_patterns=list(SAFE_FILES)
        )
    except RevisionNotFoundError as error:
        raise PrismError(
            f"{address}: has no revision {match['revision']}; give a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise PrismError(
            f"{address}: there is no such repository, or you may not read it; correct the name, or log in "
            "with hf auth login"
        ) from error
    except Exception as error:  # of requests, of httpx or of the hub, by its version
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0])
        raise PrismError(
            f"{address}: cannot be downloaded ({reason}); check the network, and try again"
        ) from error
    if not (Path(found) / "run.json").exists():
        raise PrismError(
            f"{address}: holds no run of prism-meta (no run.json); write one with prism-meta export RUN "
            "--format hub"
        )
    return Path(found)
