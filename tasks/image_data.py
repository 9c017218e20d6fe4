"""Labelled images for the tasks on images: a folder by class, or scikit-learn's digits and photos.

A folder has a folder of images for each class, as ``data/cat/1.jpg``. Images are read with Pillow when
they are asked for. No task here downloads anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from loopkit.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
Transform = Callable[[Tensor], Tensor]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and their classes.

    Args:
        images: paths of files, or tensors [channels, height, width] with values from 0 to 1.
        labels: the class of each, from 0.
        size: height and width of the tensors that files become; None keeps theirs.
        channels: 1 for grey, 3 for colours.
        transform: what is done to a tensor each time that it is read, such as ``warped``.
    """

    def __init__(
        self,
        images: Sequence[Path | Tensor],
        labels: Sequence[int],
        size: int | None = None,
        channels: int = 3,
        transform: Transform | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.size, self.channels, self.transform = size, channels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if not isinstance(image, Tensor):
            image = read_image(image, self.size, self.channels)
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return all images [n, channels, size, size] and their labels [n]."""
        images, labels = zip(*(self[index] for index in range(len(self))))
        return torch.stack(images), torch.tensor(labels)


def labelled_images(
    data: str | None,
    *,
    held_out: bool,
    most: int | None = None,
    size: int | None = None,
    channels: int = 3,
    transform: Transform | None = None,
) -> LabelledImages:
    """Return the images of a folder by class, or digits [channels, 8, 8] if ``data`` is None.

    Every fifth image of a class is held out for evaluation.

    Args:
        data: the folder.
        held_out: whether to return the images for evaluation.
        most: how many images of each class to return; None for all.
        size: see ``LabelledImages``, as for the rest.
        channels: 1 for grey, 3 for colours.
        transform: what is done to a tensor each time that it is read.
    """
    if data is None:
        digits = load_digits()
        found = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        images: list[Path | Tensor] = list(found.repeat(1, channels, 1, 1))
        labels = digits.target.tolist()
    else:
        files = [_files(Path(data, name)) for name in class_names(data)]
        images = [path for each in files for path in each]
        labels = [label for label, each in enumerate(files) for _ in each]
    chosen = []
    for label in sorted(set(labels)):
        own = [index for index, each in enumerate(labels) if each == label]
        part = own[4::5] if held_out else [each for i, each in enumerate(own) if i % 5 != 4]
        chosen += part[:most]
    chosen.sort()
    return LabelledImages(
        [images[i] for i in chosen], [labels[i] for i in chosen], size, channels, transform
    )


def class_names(data: str | None) -> list[str]:
    """Return the names of the classes: those of the folders, or the ten digits.

    Raises:
        DataError: the folder does not have two or more folders of five or more images.
    """
    if data is None:
        return [str(digit) for digit in range(10)]
    root = Path(data)
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(names) < 2 or any(len(_files(root / name)) < 5 for name in names):
        raise DataError(
            f"{data} does not hold images by class: give a folder with a folder for each class, "
            f"each with five images or more ({', '.join(SUFFIXES)})"
        )
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def photo_patches(data: str | None, *, held_out: bool, size: int = 32) -> Tensor:
    """Return square patches of photos [n, 3, size, size].

    Every fifth column of patches is held out, and no patch reaches into another part. Patches for
    training overlap by half.

    Args:
        data: a folder with photos; None for the two that scikit-learn has.
        held_out: whether to return the patches for evaluation.
        size: height and width of a patch.

    Raises:
        DataError: no photo gives a patch.
    """
    if data is None:
        photos = [
            torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images
        ]
    else:
        photos = [read_image(path, None, 3) for path in _files(Path(data))]
    found = []
    for photo in photos:
        for left in range(0, photo.shape[2] - 5 * size + 1, 5 * size):
            middle, right = left + 4 * size, left + 5 * size
            part = photo[:, :, middle:right] if held_out else photo[:, :, left:middle]
            step = size if held_out else size // 2
            if part.shape[1] >= size:
                windows = part.unfold(1, size, step).unfold(2, size, step)
                found.append(windows.permute(1, 2, 0, 3, 4).flatten(0, 1))
    if not found:
        raise DataError(
            f"{data} gives no patch: give a folder with photos of {5 * size} x {size} pixels or more "
            f"({', '.join(SUFFIXES)})"
        )
    return torch.cat(found)


def read_image(path: Path, size: int | None, channels: int) -> Tensor:
    """Return the image of a file [channels, height, width], with values from 0 to 1.

    The middle square of an image is kept if ``size`` is given.

    Raises:
        DataError: the file is no image that Pillow reads.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except OSError as error:
        raise DataError(f"{path} is no image that Pillow reads: {error}") from error
    if size is not None:
        edge = min(image.size)
        left, top = ((length - edge) // 2 for length in image.size)
        image = image.resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge)
        )
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels.permute(2, 0, 1) if channels == 3 else pixels.unsqueeze(0)


def warped(image: Tensor, most: float = 0.1) -> Tensor:
    """Return the image, turned, scaled and moved a little at random.

    What comes in at an edge repeats the edge.

    Args:
        image: the image, [channels, height, width].
        most: the largest turn in radians, change of the scale, and shift as a part of half the size.
    """
    turn, scale, right, down = ((2 * torch.rand(4) - 1) * most).tolist()
    sin, cos = (1 + scale) * math.sin(turn), (1 + scale) * math.cos(turn)
    theta = torch.tensor([[[cos, -sin, right], [sin, cos, down]]])
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def recut(image: Tensor, size: int | None = None, smallest: float = 0.4) -> Tensor:
    """Return a random square cut of an image, mirrored half of the time, in its size.

    Args:
        image: the image, [channels, height, width].
        size: height and width of the result; None for those of ``image``.
        smallest: the smallest side of the cut, as a part of the image's shorter side.
    """
    height, width = image.shape[-2:]
    part = smallest + (1 - smallest) * torch.rand(()).item()
    edge = max(1, round(part * min(height, width)))
    top = int(torch.randint(height - edge + 1, ()))
    left = int(torch.randint(width - edge + 1, ()))
    cut = image[:, top : top + edge, left : left + edge]
    shape = (height, width) if size is None else (size, size)
    cut = F.interpolate(cut[None], shape, mode="bilinear", align_corners=False)[0]
    return cut.flip(-1) if torch.rand(()) < 0.5 else cut


def save_grid(rows: Sequence[Tensor], path: Path, scale: int = 4) -> None:
    """Write rows of images [n, channels, height, width], with values from 0 to 1, into a PNG file.

    Args:
        rows: the rows, from the top.
        path: the file.
        scale: height and width of a pixel in the file.
    """
    lines = [torch.cat(list(F.pad(row, (1, 1, 1, 1), value=1.0)), dim=-1) for row in rows]
    grid = torch.cat(lines, dim=-2).clamp(0, 1).permute(1, 2, 0).mul(255).round().byte().numpy()
    image = Image.fromarray(grid if grid.shape[2] == 3 else grid[:, :, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize([scale * length for length in image.size], Image.Resampling.NEAREST).save(path)
