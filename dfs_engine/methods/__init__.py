"""Training methods: how the exits' losses, or their gradients, become one update. One file each."""

from collections.abc import Callable
from typing import Any

from dfs_engine.checks import check_choice
from dfs_engine.methods.bdl import BDL, BDLConfig, create_bdl
from dfs_engine.methods.byot import BYOT, ByotConfig, create_byot, feature_widths
from dfs_engine.methods.cagrad import CAGrad, CAGradConfig, create_cagrad
from dfs_engine.methods.dr_mgf import DRMGF, DRMGFConfig, create_dr_mgf
from dfs_engine.methods.ge import GE, GEConfig, create_ge
from dfs_engine.methods.joint import Joint, exit_losses
from dfs_engine.methods.meta_gf import MetaGF, MetaGFConfig, create_meta_gf
from dfs_engine.methods.method import Method
from dfs_engine.methods.nash_mtl import NashMTL, NashMTLConfig, create_nash_mtl
from dfs_engine.methods.pcgrad import PCGrad, PCGradConfig, create_pcgrad
from dfs_engine.methods.wpn import WPN, WPNConfig, create_wpn
from dfs_engine.models import MultiExitModel

_METHODS: dict[str, Callable[..., Method]] = {
    "bdl1": lambda model, **options: create_bdl(model, BDLConfig(**options)),
    "bdl2": lambda model, **options: create_bdl(model, BDLConfig(**options), include_final=True),
    "byot": lambda model, **options: create_byot(model, ByotConfig(**options)),
    "cagrad": lambda model, **options: create_cagrad(model, CAGradConfig(**options)),
    "dr_mgf": lambda model, **options: create_dr_mgf(model, DRMGFConfig(**options)),
    "ge": lambda model, **options: create_ge(model, GEConfig(**options)),
    "joint": lambda model: Joint(),
    "meta_gf": lambda model, **options: create_meta_gf(model, MetaGFConfig(**options)),
    "nash_mtl": lambda model, **options: create_nash_mtl(model, NashMTLConfig(**options)),
    "pcgrad": lambda model, **options: create_pcgrad(model, PCGradConfig(**options)),
    "wpn": lambda model, **options: create_wpn(model, WPNConfig(**options)),
}


def list_methods() -> list[str]:
    """Names that `create_method` knows."""
    return sorted(_METHODS)


def section_of(name: str) -> str:
    """The section of a run's config with a method's options: its name, but for methods that share one."""
    return "bdl" if name in ("bdl1", "bdl2") else name


def create_method(name: str, model: MultiExitModel, **options: Any) -> Method:
    """Builds a training method by name.

    Args:
        name: one of `list_methods()`.
        model: what it will train, on the CPU.
        options: the method's own, e.g. the fields of `ByotConfig`.

    Raises:
        ValueError: unknown name; the message lists the known ones. A model that the method makes no sense with.
        TypeError: an option the method does not have.
    """
    return _METHODS[check_choice("method", name, _METHODS)](model, **options)


__all__ = [
    "BDL",
    "BYOT",
    "DRMGF",
    "GE",
    "WPN",
    "BDLConfig",
    "ByotConfig",
    "CAGrad",
    "CAGradConfig",
    "DRMGFConfig",
    "GEConfig",
    "Joint",
    "MetaGF",
    "MetaGFConfig",
    "Method",
    "NashMTL",
    "NashMTLConfig",
    "PCGrad",
    "PCGradConfig",
    "WPNConfig",
    "create_method",
    "exit_losses",
    "feature_widths",
    "list_methods",
    "section_of",
]
