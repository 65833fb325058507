"""Load pretrained models and tokenizers: from a local folder or the hub, safetensors only, with clear errors."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from hybridengine.config import ModelConfig
from hybridengine.errors import ConfigError, ModelError
from hybridengine.seams.randomness import seeded

__all__ = [
    "choose_device",
    "hub_or_cache",
    "load_frozen",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "quiet",
]

_OTHER_KIND = re.compile(r"(\w+)Config'> for this kind of AutoModel: (\w+)")
_KINDS = {
    "AutoModelForSeq2SeqLM": "an encoder-decoder (AutoModelForSeq2SeqLM)",
    "AutoModelForCausalLM": "a causal language (AutoModelForCausalLM)",
    "AutoModelForMaskedLM": "a masked language (AutoModelForMaskedLM)",
    "AutoModelForSequenceClassification": "a sequence classification (AutoModelForSequenceClassification)",
    "AutoModelForTokenClassification": "a token classification (AutoModelForTokenClassification)",
}


def choose_device(wish: str) -> torch.device:
    """`auto | cpu | cuda | cuda:N` as a device; without a number it is the current GPU, named by its number.

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {wish!r}, but torch {torch.__version__} sees no GPU; use auto or cpu")
    if wish == "cuda":
        wish = f"cuda:{torch.cuda.current_device()}"  # masks are pinned in this very GPU's generator
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device is {wish!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence log lines, progress bars and deprecation notes of transformers and PEFT inside; settings are restored."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _check_place(name: str, key: str) -> bool:
    """Whether the name is a local folder; refuses what looks like a path and is none."""
    path = Path(name).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise ModelError(
            f"{key}: {name[:80]!r} is no folder ({error.strerror}); give an existing one or a hub id"
        ) from None
    if folder:
        return True
    if file:
        raise ModelError(f"{key}: {name} is a file; give the folder that holds config.json and the weights")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or (os.sep in name.strip("/") and path.parent.is_dir()):
        raise ModelError(f"{key}: the folder {name} does not exist; give an existing folder or a hub id")
    return False


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Where the hub has no address here, only the local cache is asked: the hub's library would retry for 23 s."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or _out_of_reach(urlsplit(constants.ENDPOINT).hostname or "")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _out_of_reach(host: str) -> bool:
    if getproxies():
        return False  # a proxy looks names up itself
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _explained(name: str, local: bool, what: str) -> Iterator[None]:
    try:
        with quiet(), contextlib.nullcontext() if local else hub_or_cache():
            yield
    except ModelError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub share no base class
        first = " ".join(str(error).strip().splitlines()[:2])
        told = first if isinstance(error, OSError | ValueError) and first else f"{type(error).__name__}: {first}"
        if found := _OTHER_KIND.search(str(error)):  # transformers would list every class that it knows
            kind = _KINDS.get(found[2], found[2])
            raise ModelError(
                f"{name}: the task needs {kind} model, and {found[1]} models are none; name another model or change"
                " `task`"
            ) from error
        if "can't allocate memory" in told or "out of memory" in told:
            raise
        if local:
            raise ModelError(
                f"{name}: the {what} cannot be loaded ({told}); copy or download the folder again, or save it anew with"
                " save_pretrained(folder)"
            ) from error
        raise ModelError(
            f"{name} is no local folder, and the {what} could not be fetched from the hub ({told}). Without network,"
            " save the model elsewhere with save_pretrained(FOLDER), copy the folder here and set model.name: FOLDER"
        ) from error


def load_model_config(model: ModelConfig, *, key: str = "model.name") -> Any:
    """The transformers configuration of a model, without its weights; errors call its name `key`."""
    from transformers import AutoConfig

    local = _check_place(model.name, key)
    if local and (Path(model.name).expanduser() / "adapter_config.json").is_file():
        way = "; to train on from it, use `stages`" if key == "model.name" else ""
        raise ModelError(
            f"{key}: {model.name} is an adapter, not a full model; merge it first (PeftModel's merge_and_unload, then"
            f" save_pretrained){way}"
        )
    if local and (Path(model.name).expanduser() / "trained.safetensors").is_file():
        raise ModelError(
            f"{key}: {model.name} holds an adapter of hybridengine's own, not a full model, and cannot be merged into"
            " its base; name the base model, or a run that trained a full one"
        )
    if local and not (Path(model.name).expanduser() / "config.json").is_file():
        raise ModelError(
            f"{model.name}: there is no config.json, so this is no transformers model folder; give the folder that"
            " save_pretrained wrote"
        )
    if local:
        _check_weights(Path(model.name).expanduser())
    with _explained(model.name, local, "configuration"):
        return AutoConfig.from_pretrained(model.name, revision=model.revision)


def load_tokenizer(model: ModelConfig, *, key: str = "model.name", fast: bool = True) -> Any:
    """The tokenizer of a model.

    Args:
        key: what to call the name in errors.
        fast: refuse one without `tokenizer.json`, which cannot tell where a token stands in the text.
    """
    from transformers import AutoTokenizer

    name = model.tokenizer or model.name
    local = _check_place(name, "model.tokenizer" if model.tokenizer else key)
    with _explained(name, local, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model.revision)
    if fast and not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{name}: only a slow tokenizer is there; save a fast one (tokenizer.json) in the folder")
    # Without its files, transformers makes an empty tokenizer that reads every word as unknown.
    own = type(tokenizer).vocab_files_names.values()
    files = {"tokenizer.json", *own}
    if local and (fast or own) and not any((Path(name).expanduser() / file).is_file() for file in files):
        raise ModelError(
            f"{name}: there is no tokenizer in this folder (none of {', '.join(sorted(files))}); save the model's own"
            " there, or name one as model.tokenizer"
        )
    return tokenizer


def load_model(
    auto_class: str,
    model: ModelConfig,
    options: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    key: str = "model.name",
) -> tuple[nn.Module, list[str]]:
    """Load weights, and name the parameters that the checkpoint lacks (newly initialised from `seed`).

    The global random stream is as before afterwards. Weights are read from safetensors only, never from pickles.

    Args:
        key: what to call the name in errors.
    """
    import transformers

    local = _check_place(model.name, key)
    if local:
        _check_weights(Path(model.name).expanduser())
    cls = getattr(transformers, auto_class)
    arguments: dict[str, Any] = dict(options or {})
    if model.attention is not None:
        arguments["attn_implementation"] = model.attention
    with _explained(model.name, local, f"model ({auto_class})"), seeded(torch.default_generator, seed):
        loaded, info = cls.from_pretrained(
            model.name,
            revision=model.revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **arguments,
        )
    mismatched = [entry[0] if isinstance(entry, tuple | list) else str(entry) for entry in info["mismatched_keys"]]
    return loaded, sorted({*info["missing_keys"], *mismatched})


def load_frozen(
    auto_class: str, name: str, device: torch.device, *, key: str, fast: bool = True
) -> tuple[nn.Module, Any]:
    """A model that stays as it is, in evaluation mode and without gradients, and its tokenizer.

    Args:
        name: a local folder, or a hub id.
        key: what to call the name in errors.
        fast: as in `load_tokenizer`.

    Raises:
        ModelError: it cannot be loaded, or lacks weights for this kind of model.
    """
    source = ModelConfig(name=name)
    model, missing = load_model(auto_class, source, key=key)
    if missing:
        kind = _KINDS.get(auto_class, auto_class)
        raise ModelError(
            f"{key}: {name} has no weights for {', '.join(missing[:3])}, so it was not trained as {kind} model; give"
            " one that was"
        )
    return model.eval().requires_grad_(False).to(device), load_tokenizer(source, key=key, fast=fast)


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if files := sorted(folder.glob("*.safetensors")):
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: the weights are damaged or cut off ({error}); copy or download the file again"
                ) from error
        return
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: the weights are a pickle (.bin), which can run code and is never loaded; convert them once with"
            " model.save_pretrained(folder) on a machine you trust"
        )
    raise ModelError(f"{folder}: there are no weights (*.safetensors) in this folder")
