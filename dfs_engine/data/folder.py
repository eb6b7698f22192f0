"""Images of one's own, of any size: a folder of image files, one subfolder a class, or parquet files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dfs_engine.data.config import Augmentation, DataConfig, Images, RawSplits
from dfs_engine.data.draw import draw_share
from dfs_engine.data.encoded import DecodedImages, Encoded, ImageCells, ImageFiles, crops, readable
from dfs_engine.data.normalization import PRESETS
from dfs_engine.data.tables import Classes, read_table, split_files, take

LAYOUT = (
    "a folder with train/<class>/<image files> and val/<class>/<image files> (or test/), or with <class>/<image files>"
)


class Labelled(NamedTuple):
    """The images of a split, or of all splits together."""

    encoded: Encoded
    labels: Sequence[int]


def load_folder(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """Image files as torchvision's ImageFolder finds them."""
    from torchvision.datasets import ImageFolder

    root = config.folder(LAYOUT)

    def read(folder: Path) -> tuple[Labelled, list[str]]:
        try:
            found = ImageFolder(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.root: expected {LAYOUT}, got {folder} ({error}).") from error
        paths, labels = zip(*found.samples, strict=True)
        return Labelled(ImageFiles(paths), labels), found.classes

    if not any((root / name).is_dir() for name in ("train", "val", "test")):
        images, class_names = read(root)
        return _splits(config, size, images, None, class_names, f"image folder {root}")
    train_folder = root / "train"
    test_folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    train, class_names = read(train_folder)
    test, test_class_names = read(test_folder)
    if test_class_names != class_names:
        odd = sorted(set(class_names) ^ set(test_class_names))
        raise ValueError(
            f"data.root: expected the same class folders in {train_folder} and {test_folder}, got {', '.join(odd)} "
            f"in one of them only."
        )
    return _splits(config, size, train, test, class_names, f"image folder {root}")


def load_image_parquet(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """Encoded images and labels from the columns of parquet files, which stay in memory as they are."""
    image, label = config.image_column or "image", config.label_column or "label"
    expected = (
        f"parquet files train*.parquet and val*, dev* or test*, or without such names, with columns {image}, {label}"
    )
    root = config.folder(expected, or_file=True)
    files = split_files(root, expected, (".parquet",))
    tables = {name: read_table(paths, (image, label), expected) for name, paths in files.items()}
    train = tables.get("train") or tables["all"]
    classes = Classes(train, label)

    def labelled(name: str) -> Labelled | None:
        return Labelled(ImageCells(tables[name], image), classes.of(tables[name])) if name in tables else None

    images = labelled("train") or labelled("all")
    assert images is not None
    return _splits(config, size, images, labelled("test"), classes.names, f"parquet images {root}")


def _splits(
    config: DataConfig,
    size: tuple[int, int],
    train: Labelled,
    test: Labelled | None,
    class_names: list[str],
    title: str,
) -> RawSplits:
    """Random resized crops of the training images; resized, and the centre cut out, for testing.

    Args:
        test: None: a share of `train`.
    """
    train_rows = readable(train.encoded, config.skip_broken, "the training images" if test else "the images")
    if test is None:
        kept, drawn = draw_share(take(train.labels, train_rows), config.test_share(len(train_rows)), config.split_seed)
        test, test_rows, train_rows = train, take(train_rows, drawn), take(train_rows, kept)
        how = f" drawn by split_seed {config.split_seed}"
    else:
        test_rows, how = readable(test.encoded, config.skip_broken, "the test images"), ""
    augmented, centred = crops(config, size)
    return RawSplits(
        train=Images(DecodedImages(train.encoded, train_rows, augmented), take(train.labels, train_rows)),
        test=Images(DecodedImages(test.encoded, test_rows, centred), take(test.labels, test_rows)),
        class_names=class_names,
        description=f"{title} ({len(train_rows)} train / {len(test_rows)} test{how})",
        normalization=PRESETS["imagenet"],
        augmentation=Augmentation(flip=True, policy="imagenet"),
        train_as_test=DecodedImages(train.encoded, train_rows, centred),
    )
