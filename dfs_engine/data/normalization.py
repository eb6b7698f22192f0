"""Which mean and standard deviation images are normalised by: they belong to the weights as much as to the data."""

from typing import NamedTuple

Channels = tuple[float, float, float]


class Normalization(NamedTuple):
    """Of pixels from 0 to 1: red, green, blue."""

    mean: Channels
    std: Channels

    def __str__(self) -> str:
        name = next((f" ({name})" for name, preset in PRESETS.items() if preset == self), "")
        mean, std = (" ".join(f"{value:g}" for value in values) for values in self)
        return f"mean {mean}, std {std}{name}"


PRESETS = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # timm's IMAGENET_INCEPTION_MEAN and _STD, which most of its pretrained ViTs were made with.
    "inception": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # The published code's, for CIFAR-10 and CIFAR-100 alike; its std is neither's.
    "published": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def check_normalization(mean: object, std: object) -> None:
    """Raises ValueError, naming data.mean or data.std, unless both together say what to do."""
    for name, value in (("mean", mean), ("std", std)):
        expected = f"data.{name}: expected three numbers, for example [0.5, 0.5, 0.5], or one of {', '.join(PRESETS)}"
        if isinstance(value, str):
            valid = value in PRESETS
        else:
            lowest = 0 if name == "mean" else 1e-6
            valid = value is None or (
                isinstance(value, (tuple, list)) and len(value) == 3 and all(lowest <= number <= 1 for number in value)
            )
        if not valid:
            raise ValueError(f"{expected}, got {value!r}. Numbers are of pixels from 0 to 1.")
    if mean is None and std is not None:
        raise ValueError(f"data.mean: expected one with data.std={std!r}, got none. Give both, or neither.")
    # One of each is what a flag beside a saved configuration gives by accident.
    if mean is not None and isinstance(mean, str) != (std is None or isinstance(std, str)):
        raise ValueError(
            f"data.std: expected one of the same kind as data.mean={mean!r}, got {std!r}. "
            "Give both in numbers, or both by a preset's name."
        )


def published_data(input_shape: tuple[int, ...]) -> dict[str, Channels]:
    """`DataConfig`'s fields that a published checkpoint must be measured with, by its model's input: CIFAR's alone."""
    return PRESETS["published"]._asdict() if input_shape == (3, 32, 32) else {}
