"""Reading a GGUF file, the format of llama.cpp: the only source whose weights have to be loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import first_of, message_of, short_name


def load_gguf(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model, dequantised to float32, and the tokenizer of a GGUF file.

    Raises CheckpointError where there is none, it is cut, or it lacks weights that a model of its settings has.
    """
    try:
        is_file = file.is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{short_name(file)}' cannot be read: {message_of(error)}") from error
    if not is_file:
        raise CheckpointError(f"'{short_name(file)}': no such file")
    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with TemporaryDirectory() as alone:  # an adapter or a config that lies beside the file is not part of it
            (Path(alone) / file.name).symlink_to(file.resolve())
            opened: Any = AutoModelForCausalLM.from_pretrained(
                alone, dtype=torch.float32, output_loading_info=True, **arguments
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(alone, **arguments)
    except ImportError as error:
        raise CheckpointError("reading a GGUF file needs the package gguf: pip install 'rpb_retrofit[gguf]'") from error
    except Exception as error:  # whatever a cut or a damaged file causes in its reader
        raise CheckpointError(
            f"'{file}' cannot be read as GGUF ({message_of(error) or type(error).__name__}): fetch it again"
        ) from error
    loaded, info = opened
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"'{file}' lacks {len(missing)} of its weights ({first_of(missing)}): a damaged file")
    # What Transformers loaded remembers that it was quantised, and would not be saved as plain weights.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    with no_init_weights():
        model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_dict(loaded.generation_config.to_dict())
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = str(file)
    return model.eval(), tokenizer
