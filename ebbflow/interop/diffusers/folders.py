"""A diffusers pipeline from a folder, reading nothing but what is known to be data.

Only safetensors weights are read, only from inside the folder, without the network; classes are
those named here, never code of the folder.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ebbflow.files import read_json
from ebbflow.interop.diffusers.adapters import ADAPTERS
from ebbflow.interop.diffusers.schedules import FAMILIES, library, refuse, scheduler_of

PIPELINES = (
    "DDIMPipeline",
    "DDPMPipeline",
    "DiTPipeline",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
AUTOENCODERS = ("AutoencoderKL",)
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
KINDS: dict[str, tuple[str, Collection[str]]] = {
    "unet": ("diffusers", ADAPTERS),
    "transformer": ("diffusers", ADAPTERS),
    "vae": ("diffusers", AUTOENCODERS),
    "scheduler": ("diffusers", FAMILIES),
    "text_encoder": ("transformers", ENCODERS),
    "tokenizer": ("transformers", TOKENIZERS),
}
"""For each part of a pipeline the library and the classes that are read."""
OWN = ["ebbflow.interop.diffusers.scheduler", "Scheduler"]
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that judge pictures or read them: no part of the denoiser, left out."""


def pipeline_of(folder: str | Path) -> Any:
    """The pipeline in a folder that `save_pretrained` wrote.

    Raises FileNotFoundError where there is none, and ValueError, naming the part and the field, for
    kinds that are not known, missing parts, pickled weights and weights that do not fit.
    """
    folder = Path(folder)
    index = read_json(_existing(folder, "model_index.json"))
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        refuse("model_index._class_name", name, PIPELINES)
    kind = getattr(library("diffusers"), str(name))
    takes = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = {}
    for key, value in index.items():
        if key.startswith("_") or key not in takes:
            continue
        if key in UNUSED or value in (None, [None, None]):
            parts[key] = None
        elif isinstance(value, list):
            parts[key] = _part(folder, key, value)
        else:
            parts[key] = value
    missing = [key for key, p in takes.items() if p.default is p.empty and key not in parts]
    missing = [key for key in missing if key not in ("self", *UNUSED)]
    if missing:
        raise ValueError(f"{folder / 'model_index.json'} lacks {missing}, which {name} needs")
    if "requires_safety_checker" in takes:
        parts = {"safety_checker": None, "feature_extractor": None, **parts}
        parts["requires_safety_checker"] = False
    if "add_watermarker" in takes:
        parts["add_watermarker"] = False
    return kind(**parts)


def network_of(folder: str | Path) -> nn.Module:
    """The one network in a folder of its own, for which the caller knows the scheduler."""
    folder = Path(folder)
    name = read_json(_existing(folder, "config.json")).get("_class_name")
    if name not in ADAPTERS:
        refuse("config._class_name", name, ADAPTERS)
    return _weights(folder, "network", "diffusers", str(name))


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        hint = ""
        if (folder / "config.json").is_file() and name == "model_index.json":
            hint = "; it holds a network alone: give its scheduler too, load(folder, scheduler=…)"
        raise FileNotFoundError(
            f"{folder} has no {name}: a folder that save_pretrained wrote is expected{hint}"
        )
    return folder / name


def _part(root: Path, key: str, value: list[Any]) -> Any:
    """The component `key`, which the index says is `value = [library, class]`."""
    owner, kinds = KINDS.get(key.removesuffix("_2").removesuffix("_3"), ("", ()))
    source, name = value if len(value) == 2 else (None, None)
    own = key == "scheduler" and value == OWN
    if not own and (source != owner or name not in kinds):
        names = ", ".join(f"{owner}.{kind}" for kind in kinds)
        raise ValueError(
            f"model_index.{key} is {value!r:.80}; known: {names or 'no such part'}; code of a "
            "folder is never run"
        )
    folder = root / key
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"model_index.{key}: {folder} leads out of {root}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: model_index.json lists {key}")
    if own:
        _existing(folder, "scheduler_config.json")
        return import_module(OWN[0]).Scheduler.from_pretrained(folder)
    if name in FAMILIES:
        config = read_json(_existing(folder, "scheduler_config.json"))
        if config.get("_class_name", name) != name:
            raise ValueError(
                f"scheduler._class_name is {config['_class_name']!r}, and model_index.scheduler "
                f"says {name!r}"
            )
        return scheduler_of({**config, "_class_name": name})
    if name in TOKENIZERS:
        try:
            return getattr(library("transformers"), name).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{key}: {name} cannot be read from {folder}: {error}") from error
    return _weights(folder, key, owner, str(name))


def _weights(folder: Path, key: str, source: str, name: str) -> nn.Module:
    """A network with the safetensors weights of its folder, all of them and no others."""
    config = read_json(_existing(folder, "config.json"))
    if config.get("_class_name", name) != name:
        raise ValueError(
            f"{key}._class_name is {config['_class_name']!r}, and model_index.{key} says {name!r}"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{key}: {folder}/adapter_config.json names another model to read; fuse the adapter "
            "into the weights and save the pipeline again"
        )
    stem = "diffusion_pytorch_model" if source == "diffusers" else "model"
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    options["output_loading_info"] = True
    variant = _variant(folder, key, stem)
    if variant is not None:
        options["variant"] = variant
    if source == "diffusers":
        options["low_cpu_mem_usage"] = library("diffusers").utils.is_accelerate_available()
    kind = getattr(library(source), name)
    try:
        with _silent():
            module, report = kind.from_pretrained(folder, **options)
    except Exception as error:  # whatever the library finds wrong with it
        raise ValueError(f"{key}: {name} cannot be read from {folder}: {error}") from error
    missing, wrong = list(report["missing_keys"]), list(report.get("mismatched_keys", ()))
    unknown = list(report.get("unexpected_keys", ()))
    if missing or wrong or unknown:
        raise ValueError(
            f"{key}: the weights in {folder} do not fit {key}/config.json; missing {missing[:3]}, "
            f"unknown {unknown[:3]}, of another shape {wrong[:3]}"
        )
    return module.eval()


@contextmanager
def _silent() -> Iterator[None]:
    """transformers draws a bar for every file that it reads."""
    transformers = sys.modules.get("transformers")
    log: Any = getattr(getattr(transformers, "utils", None), "logging", None)
    shown = transformers is not None and log.is_progress_bar_enabled()
    if shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _variant(folder: Path, key: str, stem: str) -> str | None:
    """None where there are plain weights, else the one variant ("fp16") that there is."""
    indices = sorted(folder.glob(f"{stem}*.safetensors.index*.json"))
    for path in indices:
        shards = read_json(path).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        bad = [n for n in names if not isinstance(n, str) or Path(n).name != n]
        if bad:
            raise ValueError(f"{path}: weight_map names {json.dumps(bad[0])}, no file beside it")
    if (folder / f"{stem}.safetensors").is_file() or any(
        path.name == f"{stem}.safetensors.index.json" for path in indices
    ):
        return None
    found = sorted(path.name.split(".")[1] for path in folder.glob(f"{stem}.*.safetensors"))
    if found:
        return found[0]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{key}: {folder} has pickled weights only ({pickled[0]}), which can run code when "
            "they are read; where you trust them, open the pipeline with diffusers and write it "
            "again: pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{key}: {folder} has no {stem}.safetensors")
