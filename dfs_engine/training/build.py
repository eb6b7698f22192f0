"""The parts of a run, built from its config."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dfs_engine.methods import Method, create_method, section_of
from dfs_engine.models import MultiExitModel, create_model
from dfs_engine.runtime.extras import needs
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.idle_columns import hold_idle_columns

if TYPE_CHECKING:
    from accelerate import Accelerator
    from timm.utils import ModelEmaV3


def build_model(config: ModelConfig, num_classes: int, device: str | None = None) -> MultiExitModel:
    """The model that `config` names; on device "meta" without values, and pretrained ones are not read."""
    return create_model(num_classes=num_classes, device=device, **_model_arguments(config))


def input_shape(config: ModelConfig) -> tuple[int, ...]:
    """Of one sample that the model was made for (see `MultiExitModel`), found without making its weights."""
    return create_model(**_model_arguments(config), device="meta").input_shape


def _model_arguments(config: ModelConfig) -> dict[str, Any]:
    shared = {name: value for name, value in vars(config).items() if name not in ("pretrained", "options")}
    own = {} if config.pretrained is None else {"pretrained": config.pretrained}
    return dict(**shared, **own, **config.options)


def build_method(config: TrainConfig, model: MultiExitModel) -> Method:
    """The method that `config` names, with the options in the config's section of the same name.

    Raises:
        ValueError: it does not go with the model, or with what else the config asks for.
    """
    section = getattr(config, section_of(config.method), None)
    method = create_method(config.method, model, **(vars(section) if section else {}))
    for given in _given(config):
        if given.name in method.refuses:
            raise ValueError(
                f"{given.argument}: expected {given.expected} with method={config.method}, got {given.value}: "
                f"{method.refuses[given.name]}. {given.remedy}"
            )
    return method


class _Given(NamedTuple):
    """One of `methods.REFUSABLE` that a config asks for, in the words of an error message."""

    name: str
    argument: str
    expected: str
    value: str
    remedy: str


def _given(config: TrainConfig) -> Iterator[_Given]:
    optim, size = config.optim, config.micro_batch_size
    if config.compile:
        yield _Given("compile", "compile", "false", "true", "Leave it out.")
    if config.precision == "fp16":
        yield _Given("fp16", "precision", "fp32 or bf16", "fp16", "Use --precision bf16.")
    if size is not None:
        yield _Given("micro_batch_size", "micro_batch_size", "none", str(size), "Leave it out.")
    if optim.ema_decay:
        yield _Given("ema", "optim.ema_decay", "0", str(optim.ema_decay), "Leave it out.")
    if optim.name == "adamw":
        yield _Given("adamw", "optim.name", "sgd", "adamw", "Leave it out.")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """In one fused call; without `decay_norm_and_bias`, vectors (norms and biases) are not decayed."""
    parameters = list(model.parameters())
    if config.decay_norm_and_bias:
        groups = [{"params": parameters, "weight_decay": config.weight_decay}]
    else:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer: Optimizer
    if config.name == "adamw":
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
    else:
        optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    for part in model.modules():
        if isinstance(part, MultiExitModel):
            hold_idle_columns(optimizer, part)
    return optimizer


def build_ema(model: MultiExitModel, config: OptimConfig) -> "ModelEmaV3 | None":
    """timm's moving average of the weights of `model`, a copy of it that is not to be prepared yet; None: no average.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    if config.ema_decay == 0:
        return None
    with needs("vision"):
        from timm.utils import ModelEmaV3
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)


def accelerator_for(device: str, precision: str) -> "Accelerator":
    """Device, precision and processes (of `torchrun` or `accelerate launch`, if one of them started this)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first precision of a process for ever; a second run here may want another.
    AcceleratorState._reset_state()
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":  # accelerate would quietly compute in fp32
        raise ValueError("precision: expected fp32 or bf16 on the CPU, got fp16. Use --precision bf16.")
    return Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no"}.get(precision, precision),
    )


def train_accelerator(config: TrainConfig, model: MultiExitModel, method: Method) -> "Accelerator":
    """`accelerator_for` the run, told whether some parameters of `model` get no gradient.

    Raises:
        ValueError: several processes, with a method that refuses them.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = accelerator_for(config.device, config.precision)
    if accelerator.num_processes > 1 and "processes" in method.refuses:
        pieces = "" if "micro_batch_size" in method.refuses else ", with --micro_batch_size if the batch is too large"
        raise ValueError(
            f"method: expected joint, byot, ge or meta_gf with {accelerator.num_processes} processes, got "
            f"{config.method}: {method.refuses['processes']}. Train in one process{pieces}."
        )
    if accelerator.num_processes > 1:
        # Looking for them costs a walk over the graph in every step, so only where there are any.
        unused = _has_unused_parameters(model, method)
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
    return accelerator


def _has_unused_parameters(model: MultiExitModel, method: Method) -> bool:
    """Whether a training step leaves some parameter without a gradient (beta 0 and 1 can)."""
    probe = copy.deepcopy(model).eval()  # eval: a batch norm may not like so few values
    logits, features = method.run(probe, model.example_input(2))
    copy.deepcopy(method)(logits, torch.zeros(2, dtype=torch.long), features).backward()
    return any(parameter.grad is None for parameter in probe.parameters())
