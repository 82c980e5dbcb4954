"""Load a model and its processor by name; images.py reads images.

No code of a checkpoint is ever run (`trust_remote_code` stays off), and the bundled model needs no
network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import BadInput, MissingDependency, UnsupportedModel, VlmfixError
from vlmfix.images import load_image, one_line

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_image", "load_model"]

_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
_WAY_OUT = "MODEL is a hub id, a local model folder, or 'emoji' (the bundled model)"


def load(
    name: str | os.PathLike[str] = "emoji",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load a vision-language model in eval mode, and its processor.

    Args:
        name: "emoji" for the bundled model, a local folder, or a hub id.
        dtype: bfloat16, float16 or float32, as a torch dtype or by name; default: the
            checkpoint's own.
        device: device of the model; default: a CUDA device if there is one.
        processor_kwargs: options of the processor's from_pretrained(), such as
            {"fix_mistral_regex": True}, or {"max_pixels": 401408} for the images of Qwen-VL.

    Returns:
        The model and its processor.

    Raises:
        BadInput: the name leads to no usable checkpoint.
        UnsupportedModel: the checkpoint is not a vision-language model of transformers.
        MissingDependency: the processor needs a package that is not installed.
    """
    text = os.fspath(name)
    options = dict(processor_kwargs or {})
    if "trust_remote_code" in options or (options and text == "emoji"):
        raise BadInput(
            f"processor_kwargs={options}: the bundled model's processor takes no options, and no "
            "other may run code of its checkpoint (trust_remote_code)"
        )
    if text == "emoji":
        return _bundled(dtype, device)
    # The processor is small and fails more often, so it is loaded before the weights.
    config = _config(text)
    processor = _processor(text, config, options)
    return _weights(text, dtype, device), processor


def load_model(
    name: str | os.PathLike[str] = "emoji",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load a model without its processor. Arguments and errors are those of `load`."""
    text = os.fspath(name)
    if text == "emoji":
        return _bundled(dtype, device)[0]
    _config(text)
    return _weights(text, dtype, device)


def _bundled(dtype: Any, device: Any) -> tuple[Any, Any]:
    from vlmfix.emoji import load as load_bundled

    kind, place = as_dtype(dtype), as_device(device)
    model, processor = load_bundled(kind) if kind else load_bundled()
    return model.to(place), processor


def _config(name: str) -> Any:
    """The checkpoint's config, once it is known to be a vision-language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"no config.json in the folder {name}: a model folder holds config.json, the "
                "weights (*.safetensors) and the processor's files"
            )
    elif folder.exists():
        raise BadInput(f"{name} is a file; {_WAY_OUT}")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BadInput(f"no folder {name}; {_WAY_OUT}")
    try:
        config = AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:  # what is in a file decides what transformers raises
        raise _explained(name, error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = "a text-only model" if getattr(config, "vision_config", None) is None else "a model"
        raise UnsupportedModel(
            f"{name} is {kind} of type {config.model_type!r}, which transformers does not load as "
            "image-text-to-text: pass a vision-language model, such as LLaVA or Qwen2.5-VL"
        )
    for part in (config, *(getattr(config, part, None) for part in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if layers is not None and layers < 1:
            raise BadInput(
                f"config.json of {name}: num_hidden_layers of {part.model_type} is {layers}: "
                "download it again"
            )
    return config


def _weights(name: str, dtype: Any, device: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    kind, place = as_dtype(dtype), as_device(device)  # a wrong one is told before the weights load
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            _place(name),
            dtype=kind or "auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise BadInput(
            f"the weights of {name} are damaged: {one_line(error)}; download them again"
        ) from error
    except Exception as error:  # as with the configuration
        raise _explained(name, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadInput(
            f"{name} lacks {len(missing)} of the model's weights ({missing[0]}, ...), which would "
            "be random: download it again"
        )
    _check_generation(name, model.generation_config)
    return model.eval().to(place)


#: Settings that generate() compares and counts with, and ids, of which there may be several.
_NUMBERS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("num_beams", "num_return_sequences", "length_penalty", "no_repeat_ngram_size"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "guidance_scale", "max_time", "prompt_lookup_num_tokens"),
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")


def _check_generation(name: str, config: Any) -> None:
    """Refuse what transformers reads from generation_config.json and fails on in an answer."""
    for field in (*_NUMBERS, *_IDS):
        value = getattr(config, field, None)
        values = value if field in _IDS and isinstance(value, list) else [value]
        kinds = int if field in _IDS else (int, float)
        for one in values:
            if one is not None and (isinstance(one, bool) or not isinstance(one, kinds)):
                raise BadInput(
                    f"generation_config.json of {name}: {field} is {value!r}, which is no number: "
                    "correct it, or delete the file"
                )


def _processor(name: str, config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(_place(name), trust_remote_code=False, **options)
    except Exception as error:  # damaged files raise anything, a tokenizer's even bare Exceptions
        if "torchvision" in str(error).lower():
            raise MissingDependency(
                f"the processor of {name} ({config.model_type}) needs torchvision, in the build "
                f"that belongs to your torch: {_torchvision_command()}. "
                "Qwen-VL, GLM-V, InternVL, SmolVLM, Mistral 3, Pixtral and LLaVA-OneVision need "
                "it; LLaVA with a CLIP tower, LLaVA-NeXT, Gemma 3, PaliGemma, Idefics 3 and Aya "
                "Vision do not"
            ) from error
        if isinstance(error, ImportError):
            raise MissingDependency(
                f"the processor of {name} needs a package: {one_line(error)}"
            ) from error
        if Path(name).expanduser().is_dir():
            raise BadInput(
                f"no usable processor in the folder {name} (processor_config.json or "
                "preprocessor_config.json, and the tokenizer's files): save it there with "
                f"processor.save_pretrained(folder). What went wrong: {one_line(error)}"
            ) from error
        raise _explained(name, error) from error
    if getattr(processor, "image_processor", None) is None:
        raise BadInput(
            f"{name} has a tokenizer but no image processor: save the model's own processor there "
            "with processor.save_pretrained(folder)"
        )
    _complete(name, processor, config)
    return processor


#: Tokens of a vision tower besides those of its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def _complete(name: str, processor: Any, config: Any) -> None:
    """Tell a LLaVA's processor what its model says of the image, where an old folder does not.

    Folders from before processor_config.json lack all of it, some later ones the class token.
    """
    vision = getattr(config, "vision_config", None)
    class_tokens = _CLASS_TOKENS.get(str(getattr(vision, "model_type", None)))
    if getattr(processor, "patch_size", 0) is None:
        patch = getattr(vision, "patch_size", None)
        strategy = getattr(config, "vision_feature_select_strategy", None)
        if None in (patch, strategy, class_tokens):
            raise BadInput(
                f"the processor of {name} does not know its patch_size, and config.json does not "
                "tell: pass patch_size, vision_feature_select_strategy and "
                "num_additional_image_tokens as processor_kwargs"
            )
        processor.patch_size, processor.vision_feature_select_strategy = patch, strategy
    if getattr(processor, "num_additional_image_tokens", None) == 0 and class_tokens:
        processor.num_additional_image_tokens = class_tokens


def _explained(name: str, error: Exception) -> VlmfixError:
    """Turn a long message of transformers into one sentence with the way out."""
    text = str(error)
    for symptoms, kind, message in _SYMPTOMS:
        if any(symptom in text for symptom in symptoms):
            return kind(message.format(name=name))
    return BadInput(f"cannot load {name}: {one_line(error)}; {_WAY_OUT}")


_FETCH = "download it where there is a network (`hf download NAME`) and pass the folder"
_SYMPTOMS: tuple[tuple[tuple[str, ...], type[VlmfixError], str], ...] = (
    (
        ("trust_remote_code",),
        UnsupportedModel,
        "{name} needs its own code, which vlmfix does not run: use a checkpoint in the format of "
        "transformers (its name often ends in -hf)",
    ),
    (
        ("does not recognize this architecture",),
        UnsupportedModel,
        "this transformers does not know the model type of {name}: update transformers",
    ),
    (("valid JSON",), BadInput, "config.json of {name} is not valid JSON: download it again"),
    (("gated",), BadInput, "{name} is gated: accept its terms on the hub and log in, or " + _FETCH),
    (
        ("connect to", "offline", "cached files"),
        BadInput,
        "{name} is neither a folder nor in the local cache, and the hub is out of reach: " + _FETCH,
    ),
    (
        ("is not a valid model identifier", "Repository Not Found"),
        BadInput,
        "the hub has no model {name}, or it is private; " + _WAY_OUT,
    ),
)


def _torchvision_command() -> str:
    """What installs the torchvision of this torch, and leaves torch alone."""
    version = metadata.version("torch")
    _, local, build = version.partition("+")
    command = f"pip install torchvision torch=={version}"
    if not local:
        return f"`{command}`"
    # The default index has no such builds: pip would take a torchvision whose operators are made
    # for another one.
    return (
        f"`{command} --index-url INDEX`, INDEX being the index that your torch of build {build!r} "
        "came from (pytorch.org, Get Started, names it)"
    )


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def as_dtype(dtype: Any) -> Any:
    """A torch dtype, or None for the checkpoint's own."""
    import torch

    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype
    if dtype not in _DTYPES:
        raise BadInput(f"unknown dtype {dtype!r}: use bfloat16, float16 or float32")
    return getattr(torch, _DTYPES[dtype])


def as_device(device: Any) -> Any:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"unknown device {device!r}: use cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            f"device {device!r} is not available, because torch sees no CUDA device: use cpu"
        )
    if chosen.type == "meta":
        raise BadInput(f"device {device!r} holds no weights, so the model could not run: use cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise BadInput(
            f"device {device!r} is not available ({one_line(error)}): use cpu"
        ) from error
    return chosen
