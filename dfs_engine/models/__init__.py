"""Multi-exit models: the contract, the registry, one file a family."""

from dfs_engine.models import msdnet, resnet, sentences, vgg, vit  # register their models
from dfs_engine.models.attach import AttachedModel, attach_exits
from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.official import load_official_state_dict, to_official_state_dict
from dfs_engine.models.registry import check_model, create_model, list_models
from dfs_engine.models.weights import load_model, read_description, save_model
from dfs_engine.nn import VARIANTS

__all__ = [
    "VARIANTS",
    "AttachedModel",
    "MultiExitModel",
    "attach_exits",
    "check_model",
    "create_model",
    "list_models",
    "load_model",
    "load_official_state_dict",
    "msdnet",
    "read_description",
    "resnet",
    "save_model",
    "sentences",
    "to_official_state_dict",
    "vgg",
    "vit",
]
