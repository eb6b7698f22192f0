"""What `dfs bench train` times: the cases of one interleaving, and the flags that choose them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dfs_engine.benchmarks.options import LAYOUTS, check_least, split_ints
from dfs_engine.checks import check_choice, split_betas, split_choices
from dfs_engine.models import VARIANTS, check_model
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import memory
from dfs_engine.validate.tolerances import DTYPES

# Multi-exit training in stock PyTorch: without surgery, and two formulations of it.
STOCK_VARIANTS = ("dense", "detach", "split")
# Variants that split nothing, so that beta means nothing to them; `byot` is BYOT's loss on `dense`.
UNSPLIT = ("dense", "byot")
# `StepCase.compile` -> the CSV's `mode`. CUDA graphs: "reduce-overhead", torch.compile's; "captured", the step as one.
_MODES = {
    "off": "eager", "on": "compile", "reduce-overhead": "compile, reduce-overhead", "captured": "eager, captured",
}  # fmt: skip
COMPILE_OF_MODE = {mode: name for name, mode in _MODES.items()}
# Of the mode, where stock attention is not PyTorch's fused one.
PLAIN_ATTENTION = ", plain attention"


class StepCase(NamedTuple):
    """One way to train the model. `beta` is None where nothing is split."""

    variant: str
    layout: str
    compile: str
    beta: float | None = None
    allocator: str = "stock"
    attention: str = "fused"

    @property
    def mode(self) -> str:
        attention = "" if self.attention == "fused" else PLAIN_ATTENTION
        allocator = "" if self.allocator == "stock" else f", {self.allocator}"
        return f"{_MODES[self.compile]}{attention}{allocator}"

    def __str__(self) -> str:
        beta = "" if self.beta is None else f"/beta={self.beta:g}"
        return f"{self.variant}/{self.layout}/{self.mode}{beta}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainConfig:
    """What `dfs bench train` times. Lists are comma-separated.

    Data is synthetic: normal images or random tokens, random labels. Dropout is off, unless it is asked for.

    Attributes:
        model: A model's name, as of `dfs train --model.name`.
        options: The family's own options, for example {config: {num_hidden_layers: 6}} of a BERT.
        batch_size: Images (or texts of 128 tokens) per step. Each is a measurement of its own.
        variants: Some of dense, detach, split, dfs, and byot (BYOT's loss on the dense model).
        layouts: Some of nchw, channels_last; one is enough for a model of linear layers.
        compile: Some of off, on (torch.compile, whole graph).
        attentions: Of the stock forms of a transformer, some of fused (PyTorch's scaled_dot_product_attention, the
            default of transformers and timm) and plain (their attn_implementation="eager" and fused_attn=False).
        allocators: Some of stock, caching (dfs_engine.memory, with which `dfs train` runs); "auto" is both where it is
            there, on the CPU with the C++ extension.
        dtypes: Some of fp32, bf16, fp16 (autocast, float32 parameters), fp64. Each is a measurement of its own.
        beta: Shares of channels that the deeper layers train, timed in turns with each other.
        dropout: Time steps with the model's own dropout rates, as people train. The variants are compared without,
            because what is drawn anew each time cannot be.
        backend: Kernels of the dfs variant: auto, aten, cpp or triton.
        num_classes: Width of every exit's logits.
        image_size: Height and width of the images. Default: what the model was made for.
        rounds: How often every case is timed; at least 20 for numbers to publish.
        warmup: How often it runs before that, not timed.
        max_seconds: Start no further round of a measurement after this time; all its cases have the same n. Default:
            no limit.
        num_threads: CPU threads. Default: torch's.
        device: cpu or cuda.
        seed: Of the random weights and data.
        breakdown: Profile the eager cases too, and say where a step's time goes.
        output: CSV file to append the measurements to. Default: none.
        progress: Show a progress bar in a terminal.
    """

    model: str = "vgg7_64"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: str = "100"
    variants: str = "dense,detach,split,dfs"
    layouts: str = "nchw,channels_last"
    compile: str = "off,on"
    attentions: str = "fused"
    allocators: str = "auto"
    dtypes: str = "fp32,bf16"
    beta: str = "0.5"
    dropout: bool = False
    backend: str = "auto"
    num_classes: int = 10
    image_size: int | None = None
    rounds: int = 20
    warmup: int = 2
    max_seconds: float | None = None
    num_threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    breakdown: bool = False
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        check_model(self.model)
        split_ints("batch_size", self.batch_size)
        split_choices("variants", self.variants, (*VARIANTS, "byot"))
        split_choices("layouts", self.layouts, LAYOUTS)
        split_choices("compile", self.compile, ("off", "on"))
        split_choices("attentions", self.attentions, ("fused", "plain"))
        if "caching" in self.chosen_allocators and not self._has_caching:
            raise ValueError(
                f"allocators: expected stock with device {self.device}, got {self.allocators}: the caching allocator "
                "is one of CPU memory and part of the C++ extension."
            )
        split_choices("dtypes", self.dtypes, DTYPES)
        split_betas("beta", self.beta)
        check_choice("backend", self.backend, ("auto", *backends.BACKENDS))
        check_choice("device", self.device, ("cpu", "cuda"))
        check_least(self, dict.fromkeys(("rounds", "warmup", "num_threads", "image_size"), 1))

    @property
    def _has_caching(self) -> bool:
        return self.device == "cpu" and memory.is_available()

    @property
    def chosen_allocators(self) -> list[str]:
        if self.allocators == "auto":
            return ["stock", "caching"] if self._has_caching else ["stock"]
        return split_choices("allocators", self.allocators, ("stock", "caching"))

    @property
    def cases(self) -> list[StepCase]:
        """One interleaving: what is timed for each batch size and dtype."""
        return [
            StepCase(variant, layout, compiled, beta, allocator, attention)
            for variant in split_choices("variants", self.variants, (*VARIANTS, "byot"))
            for beta in ([None] if variant in UNSPLIT else split_betas("beta", self.beta))
            for layout in split_choices("layouts", self.layouts, LAYOUTS)
            for compiled in split_choices("compile", self.compile, ("off", "on"))
            for attention in self._attentions(variant)
            for allocator in self.chosen_allocators
        ]

    def _attentions(self, variant: str) -> list[str]:
        """The engine's own steps choose by themselves."""
        return ["fused"] if variant == "dfs" else split_choices("attentions", self.attentions, ("fused", "plain"))
