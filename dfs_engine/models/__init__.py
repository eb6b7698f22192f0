"""Multi-exit models: the contract, the registry, one file a family."""

from dfs_engine.models import resnet, vgg  # register their models
from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.registry import create_model, list_models
from dfs_engine.nn.routing import VARIANTS

__all__ = ["VARIANTS", "MultiExitModel", "create_model", "list_models", "resnet", "vgg"]
