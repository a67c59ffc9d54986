"""How a base model comes into memory: which type of number, which devices, which quantisation; and what is not loaded.

No code that comes with a model is run, no pickle is opened (safetensors only), and a model some of whose weights are
missing is refused rather than filled up with random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from workbench.errors import BaseError
from workbench.usage import default_device

__all__ = ["choose_dtype", "kind_of_device", "load_parts"]

_FAILS = (OSError, KeyError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError)
_BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}


def load_parts(
    path: str | Path,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    device_map: str | Mapping | None,
    quantise: str | None,
    revision: str | None,
) -> tuple[nn.Module, object]:
    """A model, causal or encoder–decoder, and its tokenizer; see `Base.load`.

    Raises:
        BaseError: whatever keeps them from being loaded, in a sentence.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BaseError(f"dtype is {dtype!r}, expected None, 'auto' or a floating-point torch.dtype")
    if device is not None and device_map is not None:
        raise BaseError(f"device={str(device)!r} and device_map={device_map!r} exclude each other; give one")
    device = device or default_device()
    common = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    with _failures(path):
        config = AutoConfig.from_pretrained(path, **common)
    _check_code(path, config)
    with _failures(path):
        number = choose_dtype(config, kind_of_device(device, device_map), dtype)
    stored = getattr(config, "quantization_config", None) is not None
    own = {"dtype": number, "use_safetensors": True, "config": config, "output_loading_info": True}
    if quantise is not None:
        if stored:
            raise BaseError(f"{path} is stored quantised already; load it without quantise={quantise!r}")
        own["quantization_config"] = _quantisation(quantise, number)
    if device_map is not None or stored or quantise is not None:  # what is quantised is loaded where it stays
        _check_accelerate("device_map" if device_map is not None else "a quantised base")
        own["device_map"] = device_map if device_map is not None else {"": device}
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _failures(path), _no_bars():
        model, info = kind.from_pretrained(path, **common, **own)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    _check_whole(path, model, info)
    return model if "device_map" in own else model.to(device), tokenizer


def choose_dtype(config, device: str, dtype: torch.dtype | str | None) -> torch.dtype | str:
    """The type of number to load: what was asked for, or with None what suits the device ("cpu", "cuda", …).

    A processor computes in fp32; a GPU in the type that the configuration states, of the two half types always in bf16
    (fp16 overflows where bf16 does not), in fp32 where it states none.
    """
    if dtype is not None:
        return dtype
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    stated = getattr(torch, stated) if isinstance(stated, str) else stated
    if device == "cpu" or stated is None:
        return torch.float32
    return torch.bfloat16 if stated in (torch.float16, torch.bfloat16) else stated


def kind_of_device(device: str | torch.device, device_map: str | Mapping | None) -> str:
    """The type of device that does the computing, such as "cpu" or "cuda"."""
    if isinstance(device_map, Mapping):
        places = [place for place in device_map.values() if str(place) not in ("cpu", "disk")]
        device = places[0] if places else "cpu"
    elif device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device = default_device()
    elif device_map is not None:
        device = device_map
    return "cuda" if isinstance(device, int) else torch.device(device).type


def _quantisation(quantise: str, dtype: torch.dtype | str):
    """bitsandbytes' settings: NF4 (QLoRA, arXiv 2305.14314) or LLM.int8() (arXiv 2208.07339)."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if quantise not in _BITS:
        raise BaseError(f"quantise is {quantise!r}, expected None, {' or '.join(map(repr, _BITS))}")
    if not is_bitsandbytes_available():
        raise BaseError(f"quantise={quantise!r} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    more = {}
    if quantise == "4bit":
        more["bnb_4bit_quant_type"] = "nf4"
        if dtype != "auto":
            more["bnb_4bit_compute_dtype"] = dtype
    return BitsAndBytesConfig(**{_BITS[quantise]: True}, **more)


def _check_accelerate(what: str) -> None:
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise BaseError(f"{what} needs accelerate, which is not installed: pip install accelerate")


def _check_code(path: str | Path, config) -> None:
    """Refuse a configuration that names a repository of compiled code, which transformers would fetch and run."""
    for name in ("_attn_implementation", "_experts_implementation"):
        for part in (config, config.get_text_config()):
            if "/" in str(getattr(part, name, None)):
                raise BaseError(
                    f"{path} asks for {getattr(part, name)!r}, compiled code from the Hub, which is never run here; "
                    "choose a base without it"
                )


def _check_whole(path: str | Path, model: nn.Module, info: Mapping) -> None:
    """Refuse what transformers loads with a warning: weights missing or of another shape, an adapter put on top."""
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise BaseError(
            f"{path} lacks {len(lost)} of the model's weights, such as {lost[0]}; is the download complete?"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseError(
            f"{path} holds an adapter beside the model's weights; load the base itself, and the adapter apart"
        )


@contextmanager
def _failures(path: str | Path) -> Iterator[None]:
    """What transformers raises, as this package's own error."""
    try:
        yield
    except _FAILS as error:
        if "trust_remote_code" in str(error):
            raise BaseError(
                f"{path} can be loaded only by running Python code that comes with it, which is never done here; "
                "choose a base whose architecture transformers itself has"
            ) from error
        raise BaseError(f"no base model could be loaded from {path}: {error}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would stay in a notebook's stored output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
