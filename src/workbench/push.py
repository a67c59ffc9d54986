"""Uploading one's own adapters to the Hugging Face Hub, with their cards."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from workbench.adapters import CONFIG, WEIGHTS, Adapter
from workbench.card import hub_id, model_card, printable
from workbench.errors import AdapterError
from workbench.hub import hub_api, patiently, said

__all__ = ["push"]


def push(
    adapter: Adapter,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    base: str | None = None,
) -> str:
    """Save an adapter with its card and upload it in one commit: the repository holds all of it, or is as it was.

    Args:
        repo_id: owner/name; the repository is created where there is none.
        private: create it private; refused where it exists and is public.
        token: with write access; None takes the one of `hf auth login` or HF_TOKEN.
        dtype: of the stored factors.
        overwrite: replace the adapter that the repository holds.
        base: the base's id on the Hub, where the adapter names a folder of this machine or nothing.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: the adapter cannot be saved, has no base that others could load, the repository holds something
            else, or the Hub refuses; it says what to do.
    """
    if not hub_id(repo_id) or "/" not in repo_id:
        raise AdapterError(f"{repo_id!r} is no repository's id; expected owner/name, such as 'me/merged-adapter'")
    adapter = replace(adapter, base=adapter.base if base is None else base)
    if not hub_id(adapter.base):
        raise AdapterError(
            f"{adapter.name}: its base is {adapter.base!r}, which is no id on the Hub, so that others could not load it; "
            "name it: push(…, base='org/model')"
        )
    token = _token(token)
    with tempfile.TemporaryDirectory() as home:
        folder = adapter.save(Path(home) / "adapter", dtype=dtype, card=model_card(adapter, repo_id))
        message = commit_message or f"Upload {printable(adapter.name, 80)}, written by workbench"
        return _upload(folder, repo_id, private, token, message, overwrite)


def _upload(folder: Path, repo_id: str, private: bool, token: str, message: str, overwrite: bool) -> str:
    """One commit through `create_commit`: `upload_folder` may split a slow upload into several."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    api, parent, created = hub_api(token), None, False
    operations: list = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        try:
            there = patiently(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
            created = True
        else:
            parent = there.sha
            files = {entry.rfilename for entry in there.siblings or ()}
            _check_replaceable(repo_id, files, overwrite)
            if private and not there.private:
                raise AdapterError(
                    f"{repo_id} exists and is public; make it private on the Hub, or choose another name"
                )
            stale = sorted(name for name in files if name.startswith("adapter_model.") and name != WEIGHTS)
            operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent).commit_url
    except AdapterError:
        raise
    except Exception as error:  # whatever the client raises, the reader needs to know what to do
        empty = f"; the new repository {repo_id} stays, empty" if created else ""
        raise AdapterError(f"{repo_id}: {_why_not(error, repo_id)}{empty}") from error


def _check_replaceable(repo_id: str, files: set[str], overwrite: bool) -> None:
    others = sorted(files - {".gitattributes", "README.md"})
    if others and CONFIG not in files:
        raise AdapterError(f"{repo_id} holds no adapter but other files, such as {others[0]}; choose another name")
    if others and not overwrite:
        raise AdapterError(f"{repo_id} holds an adapter already; choose another name or pass overwrite=True")


def _token(token: str | None) -> str:
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise AdapterError(
            "no token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token=…, with write access"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise AdapterError("the token for the Hub holds spaces or characters that no token has; copy it once more")
    return token


def _why_not(error: Exception, repo_id: str) -> str:
    """What went wrong with an upload, and what to do. (A failed transfer of the weights has no status of the Hub's.)"""
    from huggingface_hub.errors import OfflineModeIsEnabled

    owner, status = repo_id.split("/")[0], getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to upload"
    if status == 401:
        return "the Hub does not accept the token; run `hf auth login` or pass token=…, with write access"
    if status in (403, 404):
        return (
            f"the token may not write to {owner!r}, or there is no such owner; make one with write access at "
            "https://huggingface.co/settings/tokens and run `hf auth login`"
        )
    if status in (409, 412):
        return "it was changed by someone else meanwhile; look at it and push again"
    if status is None:
        return f"the upload broke off ({said(error)}); if the repository shows no new commit, push again"
    return f"nothing was uploaded: {said(error)}"
