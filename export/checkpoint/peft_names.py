"""The tensor names that PEFT (parameter-efficient fine-tuning) gives a whole model.

PEFT prefixes every name with `base_model.model.`. A module of `modules_to_save` is there twice: `original_module` as it
was, and `modules_to_save.ADAPTER`, the trained copy that the model uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemma3n_onnx.export.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
MERGE = "merge it into its base with PeftModel.merge_and_unload, save that with save_pretrained, and give its folder"
_PREFIX = "base_model.model."
_TRAINED = re.compile(r"(?P<module>.+?)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+?)\.original_module\.(?P<rest>.+)")
_UNMERGED = re.compile(r"\.(lora_\w+|base_layer)(\.|$)")


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """`{name in the base model: name in the file}`; other names than PEFT's are kept.

    Raises:
        CheckpointError: an adapter that is not merged, a module without its trained copy, or two tensors for one name.
    """
    found: dict[str, str] = {}
    originals: dict[str, str] = {}
    for name in stored:
        plain = name.removeprefix(_PREFIX)
        if _UNMERGED.search(plain):
            raise CheckpointError(f"The checkpoint has {name}, of an adapter that is not merged; {MERGE}.")
        if match := _ORIGINAL.fullmatch(plain):
            originals[f"{match['module']}.{match['rest']}"] = name
            continue
        if match := _TRAINED.fullmatch(plain):
            plain = f"{match['module']}.{match['rest']}"
        if plain in found:
            raise CheckpointError(f"The checkpoint has both {found[plain]} and {name}; remove the unused one.")
        found[plain] = name
    if untrained := sorted(originals.keys() - found.keys()):
        raise CheckpointError(f"The checkpoint has {originals[untrained[0]]}, but not the trained copy of it; {MERGE}.")
    return found
