"""Images as examples: decoded when first asked for, scaled as the model's folder says."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import DataError, MissingExtra
from calmerge.tasks.fingerprint import fingerprint

KEEP_DECODED = 1 << 28  # bytes of decoded images that one split may keep in memory


class ImageExamples:
    """Images, decoded when they are first asked for.

    Args:
        images: N images: paths, encoded bytes, or `{"bytes": ..., "path": ...}` as `datasets` writes them,
            or PIL images.
        labels: class ids, int64, [N]; None for an unlabelled pool.
        settings: the fields of `preprocessor_config.json` (do_resize, size, do_center_crop, crop_size,
            do_rescale, rescale_factor, do_normalize, image_mean, image_std, resample) and `num_channels` (1
            or 3).
        where: said in errors.

    A batch holds `pixel_values`, float32, [N, channels, height, width]. Decoded images are kept if the split
    fits 256 MB.
    """

    def __init__(
        self, images: Sequence[Any], labels: Tensor | None, settings: Mapping[str, Any], *, where: str = "images"
    ) -> None:
        if not images:
            raise DataError(f"{where}: the split is empty. Expected at least one image.")
        self.images = list(images)
        self.labels = labels
        self.settings = settings
        self.where = where
        self._decoded: dict[int, Tensor] = {}
        self.fingerprint = fingerprint([*(_image_key(image) for image in self.images), labels])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The pixels of these images and their labels."""
        pixels = torch.stack([self._pixels(int(index)) for index in indices])
        return {"pixel_values": pixels}, None if self.labels is None else self.labels[indices]

    def _pixels(self, index: int) -> Tensor:
        if index in self._decoded:
            return self._decoded[index]
        pixels = image_tensor(open_image(self.images[index], f"{self.where}, row {index + 1}"), self.settings)
        if pixels.nbytes * len(self.images) <= KEEP_DECODED:
            self._decoded[index] = pixels
        return pixels


def preprocessing(model: Path) -> dict[str, Any]:
    """`preprocessor_config.json` of a model folder, with `num_channels` from its `config.json`."""
    file = Path(model) / "preprocessor_config.json"
    if not file.is_file():
        raise DataError(
            f"{model}: no preprocessor_config.json, so it is unknown how images are scaled. "
            "Copy the one of the base model."
        )
    settings: dict[str, Any] = json.loads(file.read_text())
    config = Path(model) / "config.json"
    channels = json.loads(config.read_text()).get("num_channels", 3) if config.is_file() else 3
    return {"num_channels": channels} | settings


def open_image(image: Any, where: str) -> Any:
    """A PIL image from a path, bytes or the struct that `datasets` stores."""
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtra("pillow", "data") from None
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    try:
        opened = PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        opened.load()
    except FileNotFoundError:
        raise DataError(f"{where}: no such image: {image}.") from None
    except (OSError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: the image cannot be read ({error}).") from None
    return opened


def image_tensor(image: Any, settings: Mapping[str, Any]) -> Tensor:
    """A PIL image scaled as a `preprocessor_config.json` says: float32, [channels, height, width]."""
    import numpy
    import PIL.Image

    image = image.convert("L" if settings.get("num_channels", 3) == 1 else "RGB")
    resample = PIL.Image.Resampling(settings.get("resample", PIL.Image.Resampling.BILINEAR))
    if settings.get("do_resize", True) and settings.get("size"):
        image = image.resize(_target_size(image.size, settings["size"]), resample)
    if settings.get("do_center_crop", False):
        height, width = _height_width(settings.get("crop_size") or settings["size"])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32))
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
    if settings.get("do_rescale", True):
        pixels = pixels * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean = torch.tensor(settings.get("image_mean", 0.5), dtype=torch.float32).reshape(-1, 1, 1)
        std = torch.tensor(settings.get("image_std", 0.5), dtype=torch.float32).reshape(-1, 1, 1)
        pixels = (pixels - mean) / std
    return pixels


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return size["height"], size["width"]


def _target_size(size: tuple[int, int], target: int | Mapping[str, int]) -> tuple[int, int]:
    """PIL's (width, height) of a resized image; `shortest_edge` keeps the proportions."""
    if isinstance(target, Mapping) and "shortest_edge" in target:
        factor = target["shortest_edge"] / min(size)
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    height, width = _height_width(target)
    return width, height


def _image_key(image: Any) -> bytes:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    return image.tobytes() if hasattr(image, "tobytes") else str(image).encode()
