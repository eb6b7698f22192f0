"""The names of the BERT family; its layers are in `models.bert`, its models, which need transformers, in
`models.huggingface`.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.pretrained import pretrained_folder
from dfs_engine.models.registry import register_models
from dfs_engine.nn import Fork
from dfs_engine.runtime.extras import needs


@register_models(["bert", "distilbert", "electra", "roberta"], "own", dim=-1)
def _create(
    name: str,
    fork: Fork,
    *,
    num_classes: int,
    config: Any = None,
    pretrained: str | Path | None = None,
    device: Any = None,
    dtype: Any = None,
) -> MultiExitModel:
    """Any transformers model of the type that `name` is, with as many exits as layers; num_classes=1 is a regression.

    Args:
        config: a transformers config of that type, or the folder or file of one; or a dict of what differs from the
            pretrained model's, or from transformers' default (BERT-base and its like).
        pretrained: a folder that transformers or our `save_pretrained` wrote, or an installed package that contains
            one. Of transformers' the layers, the last exit's pooler and, where it has num_classes, the last classifier
            are read, and the other exits start at random; of ours every exit. Nothing is read on the meta device.
    """
    with needs("text"):
        from dfs_engine.models.huggingface import MODELS, read_config

    kind = MODELS[name]
    folder = None if pretrained is None else pretrained_folder(pretrained)
    settings = read_config(kind, config, folder, fork, num_classes)
    on_meta = str(device) == "meta"
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        model = kind(settings) if folder is None or on_meta else kind.start_from(folder, settings)
    return model.train().to(device=device, dtype=dtype)
