"""Publishing: a model with its tokenizer, its code and its card put together in a folder, and pushed to the Hub."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration import MoEConfig
from ..configuration.remote_code import write_remote_code
from .companions import copy_companions
from .model_card import auto_class, write_model_card
from .reading import check_fields, read_config, read_mapping
from .shards import Shards, weight_files

_WEIGHTS = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors"]
Place = Callable[[Path, Path], None]


class PublishingError(RuntimeError):
    """The Hub refused, or could not be reached."""


def find_model(run: Path | None, model: Path | None) -> Path:
    """The folder of the model that is to be published.

    Args:
        run: a run directory, which must be finished; or
        model: a saved model.

    Raises:
        ValueError: both or neither are given, the run is not there or not finished, or the folder holds no model of
            this family, a configuration that cannot be read, or not all of its weights.
    """
    if (run is None) == (model is None):
        raise ValueError(f"either --run or --model must be given; got {'neither' if run is None else 'both'}")
    if run is not None:
        if not (run / "settings.yaml").is_file():
            raise ValueError(f"--run must be a run directory, with a settings.yaml; got {run}")
        model = run / "model"
        if not model.is_dir():
            raise ValueError(
                f"--run must be finished, with a model/; got {run}, {_status(run)} (a checkpoint can be published "
                f"with --model {run}/checkpoints/step-.../model)"
            )
    assert model is not None
    if not (model / CONFIG_NAME).is_file():
        raise ValueError(f"the model must be a folder with a {CONFIG_NAME}; got {model}")
    model_type = read_mapping(model / CONFIG_NAME).get("model_type")
    if model_type != MoEConfig.model_type:
        raise ValueError(
            f"model_type must be {MoEConfig.model_type}, other models have push_to_hub; got {model_type} in {model}"
        )
    auto_class(read_config(MoEConfig, model), model)  # which the card will need
    Shards(model)  # they are all there, and whole
    return model


def check_repo(repo: str) -> None:
    """
    Raises:
        ValueError: it cannot be the name of a repository.
    """
    if repo.count("/") != 1:
        raise ValueError(f"--repo must be user/name; got {repo}")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"--repo must be user/name, as the Hub allows it; got {repo}: {error}") from error


def assemble(
    folder: Path,
    model: Path,
    *,
    name: str,
    place: Place,
    run: Path | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    revision: str | None = None,
) -> list[str]:
    """Put a model, its tokenizer, its code and its card into an empty folder.

    Args:
        folder: is there, and empty.
        model: from `find_model`.
        name: where it will be loaded from: `user/name`, or a folder's name.
        place: called with each weight file and where it shall be: `symlink` or `link_or_copy`.
        run: the run directory that the card tells of.
        license: as the Hub names it, e.g. `apache-2.0`.
        languages: as the Hub names them, e.g. `en`.
        revision: the branch it will be loaded from, where that is not `main`.

    Returns:
        What the card could have said and does not, a line each, with how to add it.

    Raises:
        ValueError: a record of the run cannot be read, or is of another model.
    """
    for file in weight_files(model):
        place(file, folder / file.name)
    for name_beside in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if (model / name_beside).is_file():
            shutil.copyfile(model / name_beside, folder / name_beside)
    copy_companions(model, folder)
    write_remote_code(folder)
    return write_model_card(folder, name=name, run=run, license=license, languages=languages, revision=revision)


def symlink(file: Path, target: Path) -> None:
    """A link to a file that is only read through it; costs nothing, whatever disk it is on."""
    target.symlink_to(file.resolve())


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link; on another disk a copy, with a progress bar."""
    try:
        os.link(file, target)
    except OSError:
        with (
            file.open("rb") as source,
            target.open("wb") as copy,
            tqdm.wrapattr(source, "read", total=file.stat().st_size, desc=file.name) as read,
        ):
            shutil.copyfileobj(read, copy, 1 << 24)


def contents(folder: Path) -> dict[str, int]:
    """Every file of a folder, by its path within it, and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def find_token() -> str:
    """The token of the environment, or the one that was logged in with.

    Raises:
        ValueError: there is none.
    """
    token = get_token()
    if token is None:
        raise ValueError("a token must be there to push with, from `hf auth login` or as HF_TOKEN; got none")
    return token


def push(folder: Path, repo: str, *, token: str, private: bool = False, revision: str | None = None) -> str:
    """Push a folder that `assemble` filled to a model repository, which is made if it is not there, as is the branch.

    What the Hub has already is not sent again, so an interrupted push is resumed by pushing again: it knows a file by
    its SHA-256 and, where `hf_xet` is installed, parts of a file by theirs. Weights of an earlier push that this model
    does not have are removed: they might be loaded in its place.

    Args:
        private: the repository is made private; one that is there must be.
        revision: the branch, made from `main` if it is not there.

    Returns:
        The address of the commit; of the last one if nothing had changed.

    Raises:
        ValueError: the Hub does not accept the card's metadata.
        PublishingError: the Hub refused, or could not be reached. The message never holds the token.
    """
    api = HfApi(token=token, library_name="equipoise")
    with _told_plainly(repo, token):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise PublishingError(f"--private must go with a private repository; got {repo}, which is public")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Publish the model with its code and card",
            delete_patterns=_WEIGHTS,
        )
    return str(commit.commit_url)


@contextmanager
def _told_plainly(repo: str, token: str) -> Iterator[None]:
    """What the Hub, or the way there, did not allow, in one sentence and without the token."""
    try:
        yield
    except PublishingError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        # What came before is not shown with it: the server's words might repeat what it was sent.
        raise PublishingError(_reason(error, repo).replace(token, "<token>")) from None


def _reason(error: BaseException, repo: str) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    refused = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    status = refused.response.status_code if refused is not None else None
    if status == 401:
        return f"the token must be one that the Hub accepts; got 401 for {repo} (`hf auth login`, or HF_TOKEN)"
    if status == 403:
        return f"the token must allow to write to {repo}; got 403"
    said = dict.fromkeys(" ".join(str(cause).split()) for cause in (refused or chain[0], chain[-1]))
    return f"{repo} could not be pushed: {': '.join(said)}; the same command goes on with what the Hub does not have"


def _status(run: Path) -> str:
    """How a run stands, in words."""
    file = run / "status.json"
    if not file.is_file():
        return "which has not begun"
    status = read_mapping(file)
    check_fields(status, {"state": str, "step": int}, str(file))
    return f"which is {status['state']} at step {status['step']}"


__all__ = [
    "PublishingError",
    "assemble",
    "check_repo",
    "contents",
    "find_model",
    "find_token",
    "link_or_copy",
    "push",
    "symlink",
]
