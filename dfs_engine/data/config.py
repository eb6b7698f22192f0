"""What the user chooses about the data, and what a dataset gives before it is transformed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data.normalization import PRESETS, Channels, Normalization, check_normalization

_OWN_IMAGES = ("image_folder", "image_parquet")
OWN_DATASETS = (*_OWN_IMAGES, "text_files")
_ENCODED_IMAGES = ("cifar10", "cifar100", *_OWN_IMAGES)
IMAGE_DATASETS = ("digits", *_ENCODED_IMAGES, "synthetic")
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
TEXT_DATASETS = (*GLUE_TASKS, "text_files")
DATASETS = IMAGE_DATASETS + TEXT_DATASETS
MIXUP_MODES = ("batch", "pair", "elem")
# Which datasets an option is of, where it is not of all.
_OPTIONS_OF = {
    "label_column": ("cifar10", "cifar100", "image_parquet", *TEXT_DATASETS),
    "image_column": ("cifar10", "cifar100", "image_parquet"),
    "text_column": TEXT_DATASETS,
    "test_fraction": OWN_DATASETS,
    "skip_broken": _ENCODED_IMAGES,
    "crop_scale": _OWN_IMAGES,
    "crop_pct": _OWN_IMAGES,
}


def is_option_of(field: str, name: str) -> bool:
    """Whether the dataset `name` has the option `field` of `DataConfig`."""
    return name in _OPTIONS_OF.get(field, (name,))


class Augmentation(NamedTuple):
    """What happens to a training image, in this order. Sizes are pixels of the dataset's own images."""

    crop_padding: int = 0
    crop_fill: int = 0
    flip: bool = False
    autoaugment: bool = False
    policy: str = "cifar10"
    color_jitter: float = 0.0
    cutout: int = 0

    def __str__(self) -> str:
        words = {
            f"random crops padded by {self.crop_padding}": self.crop_padding,
            "mirrored": self.flip,
            f"AutoAugment ({self.policy})": self.autoaugment,
            f"colour jitter {self.color_jitter:g}": self.color_jitter,
            f"cutout {self.cutout}": self.cutout,
        }
        return ", ".join(text for text, is_on in words.items() if is_on) or "no augmentation"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images or sentences to learn, and how training images are augmented. Test images never are."""

    name: str = "digits"
    """digits (1,797 real handwritten digits, needs no files), cifar10, cifar100, synthetic, one of GLUE's tasks (cola,
    sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli), or one's own: image_folder, image_parquet, text_files."""
    root: str | None = None
    """Folder of cifar10, cifar100 (torchvision's layout or Hugging Face train*.parquet, test*.parquet), of image_folder
    (train/<class>/*.png and val/ or test/; or <class>/*.png), of image_parquet and text_files (train* and val*, dev* or
    test*, or other names, or a single file; texts as .csv, .tsv, .jsonl or .parquet), or of a GLUE task (train*,
    validation*). Nothing is ever downloaded, but for a GLUE task without root, which the datasets library gets."""
    label_column: str | None = None
    """Column of the labels: words, or whole numbers. Default: label (cifar100: fine_label)."""
    image_column: str | None = None
    """Column of the encoded images. Default: image (CIFAR also: img)."""
    text_column: tuple[str, str] | str | None = None
    """Column of the texts, or of both texts of a pair: [premise,hypothesis]. Default: text; of a GLUE task, its own."""
    skip_broken: bool = False
    """Decode all images before training, leave out those that cannot be, and say how many. Else they are errors."""
    max_train: int | None = None
    """Number of training samples in an epoch, drawn afresh for each. Default: all of them."""
    val_fraction: float = 0.0
    """Share of the training samples to keep out of training. They are seen as test samples are, and measured after each
    epoch too (val_* in metrics.csv): for what must not be chosen on the test samples."""
    test_fraction: float | None = None
    """Share of the samples to test on, where one's own data have no split for that. Default: 0.2."""
    split_seed: int = 0
    """Which samples those are: another seed than the run's, so that all its repetitions leave out the same."""
    tokenizer: str | None = None
    """Of text: folder that transformers saved, or an installed package that contains one.
    Default: model.pretrained."""
    max_tokens: int = 128
    """Of text: longer texts and pairs are cut."""
    image_size: int | None = None
    """Height and width of the images that the model gets. Default: what the model was made for."""
    mean: Channels | str | None = None
    """Subtracted from pixels between 0 and 1: three numbers, or a preset's name: cifar10, cifar100, imagenet, inception
    (timm's ViTs: 0.5) or published (the published code's, for both CIFARs). Default: the dataset's; of `dfs eval`, the
    one that the weights were trained with."""
    std: Channels | str | None = None
    """What the difference is then divided by; given as mean is. Default: the same preset's."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    crop_padding: int | None = None
    """Pixels around a training image from which a crop of its own size is taken at random; 0 is off. Default: the
    dataset's (CIFAR 4)."""
    flip: bool | None = None
    """Mirror half of the images. Default: the dataset's (on for CIFAR, image_folder and image_parquet)."""
    autoaugment: bool | None = None
    """AutoAugment with the dataset's policy. Default: the dataset's (on for CIFAR)."""
    color_jitter: float = 0.0
    """Strength of colour jitter, for example 0.4: each training image's brightness, contrast and saturation are scaled
    by random factors in [1 - strength, 1 + strength]; 0 is off."""
    cutout: int | None = None
    """Side in pixels of one square blacked out at random; 0 is off. Default: the dataset's (CIFAR 16)."""
    mixup: float = 0.0
    """Alpha of mixup (timm's): pairs of images and their labels are blended, by a share drawn from Beta(alpha, alpha);
    0.8 is usual for ViTs, 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix (timm's): a random rectangle comes from the other image of a pair; 0 is off. With both on, each
    batch gets one of them."""
    mixup_prob: float = 1.0
    """Share of the batches that are mixed at all."""
    mixup_switch_prob: float = 0.5
    """Share of the mixed batches that get CutMix where both are on."""
    mixup_mode: str = "batch"
    """batch (one draw for all images of a batch), pair (one for each pair) or elem (one for each image)."""
    crop_scale: tuple[float, float] | None = None
    """Of image_folder and image_parquet: the random crop that becomes a training image has between these shares of the
    area. Default: [0.08, 1.0]."""
    crop_pct: float | None = None
    """Of image_folder and image_parquet: share of a test image's shorter side that the centre crop keeps.
    Default: 0.875 (224 of 256)."""
    synthetic_train: int = 512
    """Number of training images of the synthetic dataset."""
    synthetic_test: int = 128
    """Number of test images of the synthetic dataset."""
    synthetic_classes: int = 10
    """Number of classes of the synthetic dataset."""
    synthetic_seed: int = 0
    """Which synthetic dataset: the same seed and sizes always give the same images."""

    def __post_init__(self) -> None:
        check_choice("data.name", self.name, DATASETS)
        not_negative = ("split_seed", "num_workers", "crop_padding", "cutout", "synthetic_seed")
        ranges = {
            ">= 0": (*not_negative, "color_jitter", "mixup", "cutmix"),
            ">= 1": ("max_train", "image_size", "synthetic_train", "synthetic_test"),
            ">= 2": ("synthetic_classes",),
            ">= 3": ("max_tokens",),
            "[0, 1]": ("mixup_prob", "mixup_switch_prob"),
            "[0, 1)": ("val_fraction",),
            "(0, 1)": ("test_fraction",),
            "(0, 1]": ("crop_pct",),
        }
        check_numbers(self, "data.", ranges)
        check_choice("data.mixup_mode", self.mixup_mode, MIXUP_MODES)
        for field, names in _OPTIONS_OF.items():
            if getattr(self, field) and not is_option_of(field, self.name):
                raise ValueError(
                    f"data.{field}: expected none with data.name={self.name}, got {getattr(self, field)}. Leave it "
                    f"out: it is an option of {', '.join(names)}."
                )
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"data.crop_scale: expected two rising numbers in (0, 1], got {list(self.crop_scale)}. "
                "They are the smallest and the largest share of the area."
            )
        check_normalization(self.mean, self.std)

    def normalization(self, default: Normalization) -> Normalization:
        """The dataset's `default`, or what this config sets."""
        if self.mean is None:
            return default
        std = self.mean if self.std is None else self.std
        return Normalization(
            mean=PRESETS[self.mean].mean if isinstance(self.mean, str) else self.mean,
            std=PRESETS[std].std if isinstance(std, str) else std,
        )

    def augmentation(self, default: Augmentation) -> Augmentation:
        """The dataset's `default` with what this config sets."""
        names = ("crop_padding", "flip", "autoaugment", "color_jitter", "cutout")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return default._replace(**chosen)

    def text_columns(self) -> tuple[str, ...] | None:
        """One or two, as `text_column` says."""
        return (self.text_column,) if isinstance(self.text_column, str) else self.text_column

    def test_share(self, num_samples: int) -> float:
        """`test_fraction`, once it leaves some of the samples on both sides."""
        share = 0.2 if self.test_fraction is None else self.test_fraction
        if not 0 < round(share * num_samples) < num_samples:
            raise ValueError(
                f"data.test_fraction: expected a share that leaves some of the {num_samples} samples on both sides, "
                f"got {share}. The data at data.root={self.root} have no test split of their own."
            )
        return share

    def folder(self, expected: str, *, or_file: bool = False) -> Path:
        """`root` as an existing folder that is not empty, or as a file; `expected` says in errors what it should be."""
        if self.root is None:
            raise ValueError(f"data.root: expected a folder for data.name={self.name}, got none. Give {expected}.")
        folder = Path(self.root).expanduser()
        if or_file and folder.is_file():
            return folder
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing there"
            raise FileNotFoundError(f"data.root: expected a folder, got {folder} ({found}). Give {expected}.")
        if not any(folder.iterdir()):
            raise FileNotFoundError(f"data.root: expected a dataset, got the empty folder {folder}. Give {expected}.")
        return folder


class ImageSource(Protocol):
    """Images by position; a uint8 tensor (N, 3, H, W) is one."""

    def __getitem__(self, indices: list[int], /) -> Tensor:
        """uint8 (len(indices), 3, H, W)."""
        ...


class Images(NamedTuple):
    """One split before any transform."""

    source: ImageSource
    labels: Sequence[int]


class RawSplits(NamedTuple):
    """What each dataset's loader returns."""

    train: Images
    test: Images
    class_names: list[str]
    description: str
    normalization: Normalization
    augmentation: Augmentation
    train_as_test: ImageSource | None = None
    """The training images as test images are read, where reading them already draws at random (crops)."""
