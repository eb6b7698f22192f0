"""Any timm `VisionTransformer` by its own name, with exits at its last blocks.

The model is timm's own, cut behind block `start_block`: what lies before the cut stays one timm model, and each block
behind it is a block of the chain. An exit is a tail (norm, pool, head) like the timm model's; the last one is its own.

Where exits read the first token, the `dfs` variant computes the last block, from which nothing else is read, for it
alone, with the same result; dropout draws fewer numbers there than in the other variants.

Shapes: N images, T tokens, C embedding channels, the axis on which features are split.
"""

import copy
import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dfs_engine.models.multi_exit import Block, MultiExitModel
from dfs_engine.models.pretrained import WEIGHT_FILES, weight_file
from dfs_engine.models.registry import Family, register_catalogue
from dfs_engine.nn import (
    Exit,
    Fork,
    PartitionedLayerNorm,
    Reading,
    add,
    apply_norm_linear,
    convert_dropouts,
    map_channels,
    whole,
)
from dfs_engine.runtime.extras import needs

logger = logging.getLogger(__name__)


class ViTStem(Block):
    """Embedding and first blocks of a timm model without a tail: images (N, channels, H, W) -> (N, T, C)."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def make(self, *input: Any) -> Tensor:
        return cast(Any, self.vit).forward_features(*input)


class ViTBlock(Block):
    """One timm block: a reading of (N, T, C) -> (N, T, C).

    Args:
        exit_reads_token: whether the block's exit reads the first token alone.
    """

    def __init__(self, block: nn.Module, *, exit_reads_token: bool) -> None:
        super().__init__()
        self.block, self.exit_reads_token = block, exit_reads_token

    def make(self, *input: Any) -> Tensor:
        block: Any = self.block
        if len(input) == 1 or not reads_slices(block):
            return block(whole(input))
        qkv = apply_norm_linear(block.norm1, block.attn.qkv, input)
        return self._finish(input, *qkv.chunk(3, -1))

    def produce(self, input: tuple, fork: Fork, is_last: bool, **context: Any) -> tuple[Reading, ...]:
        block: Any = self.block
        narrows = is_last and self.exit_reads_token and len(input) == 3 and reads_slices(block)
        if not narrows:
            return super().produce(input, fork, is_last)
        # Of the other tokens only keys and values are needed.
        first = map_channels(lambda tokens: tokens[:, :1], input)
        width = block.attn.qkv.out_features // 3
        query = apply_norm_linear(block.norm1, block.attn.qkv, first, slice(width))
        others = apply_norm_linear(block.norm1, block.attn.qkv, input, slice(width, None))
        made = self._finish(first, query, *others.chunk(2, -1))
        return (made,), (made,)

    def _finish(self, input: Reading, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The block behind `qkv`, for the tokens that have a query: `input` (N, t, C) -> (N, t, C)."""
        block: Any = self.block
        tokens = add(input, block.drop_path1(block.ls1(block.attn.mix(query, key, value))))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


class ViTExit(Exit):
    """The tail of a timm model: a reading of (N, T, C) -> logits (N, num_classes).

    Args:
        tail: a timm model of which only norm, pool and head are left.
    """

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def feature(self, reading: Reading) -> Reading:
        """Of (N, T, C): normalised and pooled, (N, C)."""
        tail: Any = self.tail
        if tail.global_pool == "token":  # the norm looks at each token alone, so that of the others none is needed
            reading = map_channels(lambda tokens: tokens[:, :1], reading)
        return (tail.forward_head(tail.norm(whole(reading)), pre_logits=True),)

    def classify(self, feature: Reading) -> Tensor:
        return cast(Any, self.tail).head(*feature)


def reads_slices(block: Any) -> bool:
    """Whether `_read_slices` was done to a timm block, and nobody has put something else into it since."""
    return (
        _is_plain(block)
        and hasattr(block.attn, "mix")
        and isinstance(block.norm1, PartitionedLayerNorm)
        and isinstance(block.attn.qkv, nn.Linear)
    )


def _read_slices(block: Any) -> None:
    """Prepares a timm block to compute a slice's gradient only, if it is of a kind that `ViTBlock` can take apart."""
    from timm.layers import LayerNorm

    if _is_plain(block) and type(block.norm1) in (nn.LayerNorm, LayerNorm) and type(block.attn.qkv) is nn.Linear:
        block.norm1.__class__ = PartitionedLayerNorm


def _is_plain(block: Any) -> bool:
    from timm.models.vision_transformer import Block as PlainBlock

    from dfs_engine.models.vit_attention import is_plain

    return type(block) is PlainBlock and is_plain(block.attn)


def list_vits(pattern: str = "*") -> list[str]:
    """timm's names that match a shell pattern and whose entrypoint says that it makes a `VisionTransformer`.

    A pattern with a dot looks among the names of pretrained weights, e.g. "vit_tiny_patch16_224.*". Empty without timm.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        return []
    from timm.models.vision_transformer import VisionTransformer

    names = timm.list_models(pattern, pretrained="." in pattern)
    return [name for name in names if timm.model_entrypoint(name).__annotations__.get("return") is VisionTransformer]


def create_vit(
    name: str,
    fork: Fork,
    *,
    num_classes: int,
    start_block: int = 6,
    pretrained: bool | str | Path = False,
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> MultiExitModel:
    """A timm `VisionTransformer` with an exit after each block from `start_block` on (counted from 0).

    Args:
        name: one of `list_vits()`.
        start_block: the first block whose output has an exit.
        pretrained: True downloads timm's weights; a path reads them from a file or from a folder with one. Only blocks,
            embedding, last norm and, where it fits, last head have any; nothing is read on the meta device.
        options: timm's own, e.g. `img_size`, `depth`, `embed_dim`, `drop_path_rate`.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    with needs("vision"):
        import timm

    weights = False if str(device) == "meta" else pretrained
    vit: Any = timm.create_model(name, num_classes=num_classes, **_source(weights), **options)
    _check_start_block(start_block, len(vit.blocks))
    exit_reads_token = vit.global_pool == "token"
    deeper = (ViTBlock(block, exit_reads_token=exit_reads_token) for block in vit.blocks[start_block + 1 :])
    blocks: list[Block] = [ViTStem(vit), *deeper]
    last = _tail(vit)
    vit.prune_intermediate_layers([start_block], prune_norm=True)
    tails = [*(_fresh(last) for _ in blocks[1:]), last]
    model = MultiExitModel(
        blocks,
        [ViTExit(tail) for tail in tails],
        fork,
        num_classes=num_classes,
        input_shape=(options.get("in_chans", 3), *vit.patch_embed.img_size),
    )
    if fork.variant == "dfs":
        from dfs_engine.models.vit_attention import make_chosen

        for module in model.modules():
            make_chosen(module)
        for block in model.blocks[1:]:
            _read_slices(cast(ViTBlock, block).block)
        _warn_of_whole_blocks(name, blocks)
        convert_dropouts(model, fork.backend)
    return model.to(device=device, dtype=dtype)


register_catalogue(
    "a timm VisionTransformer such as vit_tiny_patch16_224 (with dfs_engine[vision])",
    list_vits,
    Family(create_vit, "whole", dim=-1),
)


def _tail(vit: nn.Module) -> nn.Module:
    """A copy of norm, pool and head, which timm calls as the model they belong to: the rest is left out."""
    left_out = (getattr(vit, name) for name in ("patch_embed", "norm_pre", "blocks"))
    tail: Any = copy.deepcopy(vit, {id(module): nn.Identity() for module in left_out})
    tail.cls_token = tail.reg_token = tail.pos_embed = None
    return tail


def _fresh(tail: nn.Module) -> nn.Module:
    """A tail with weights of its own."""
    tail = copy.deepcopy(tail)
    for module in tail.modules():
        if hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()
    return tail


def _source(pretrained: bool | str | Path) -> dict[str, Any]:
    """timm's arguments for where weights come from."""
    if isinstance(pretrained, bool):
        return {"pretrained": pretrained}
    found = weight_file(Path(pretrained).expanduser())
    if found is None:
        raise FileNotFoundError(
            f"pretrained: expected a weight file or a folder with {' or '.join(WEIGHT_FILES)}, got {pretrained}. "
            "True downloads timm's weights."
        )
    # timm's own loader of these models, for the authors' NumPy files, would take any file for one.
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(found), "custom_load": found.suffix == ".npz"}}


def _check_start_block(start_block: int, depth: int) -> None:
    if isinstance(start_block, bool) or not isinstance(start_block, int):
        raise TypeError(f"start_block: expected an integer, got {start_block!r}.")
    if not 0 <= start_block < depth:
        raise ValueError(
            f"start_block: expected 0 <= start_block < depth={depth}, got start_block={start_block}. "
            "It is the first block whose output has an exit."
        )


def _warn_of_whole_blocks(name: str, blocks: list[Block]) -> None:
    kinds = {
        type(block.block).__name__ for block in blocks if isinstance(block, ViTBlock) and not reads_slices(block.block)
    }
    if kinds:
        logger.warning(
            "%s: its %s cannot be taken apart, so they read a split feature as the detach variant does: "
            "the same gradients, nothing saved.",
            name,
            ", ".join(sorted(kinds)),
        )
