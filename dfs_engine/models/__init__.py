"""Multi-exit models: the contract, the registry, one file a family."""

from dfs_engine.models import bert, msdnet, vgg, vit  # register their models
from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.registry import check_model, create_model, list_models
from dfs_engine.nn.routing import VARIANTS

__all__ = ["VARIANTS", "MultiExitModel", "bert", "check_model", "create_model", "list_models", "msdnet", "vgg", "vit"]
