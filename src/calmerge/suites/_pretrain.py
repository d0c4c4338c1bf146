"""The base of the vision suite: a small vision transformer that learns printed characters which no task uses."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import DataError, FitError, MissingExtra
from calmerge._run import Run
from calmerge.suites._characters import IMAGE, Style, between, distort

# Scripts by code points (inclusive ranges, or first, last, step), with the packages whose fonts have them.
SCRIPTS: Mapping[str, tuple[Sequence[tuple[int, ...]], Sequence[str]]] = {
    "arabic": (
        [(0x621, 0x63A), (0x641, 0x64A)],
        [
            "fontpkg-amiri==1.2",
            "fontpkg-cairo==3.130",
            "fontpkg-almarai==1.100",
            "fontpkg-noto-kufi-arabic==2.109",
            "fontpkg-ibm-plex-sans-arabic==1.101",
        ],
    ),
    "tamil": ([(0xB85, 0xBB9)], ["fontpkg-catamaran==2.0", "fontpkg-noto-sans-tamil==2.4"]),
    "telugu": (
        [(0xC05, 0xC39)],
        ["fontpkg-noto-sans-telugu==2.5", "fontpkg-ramabhadra==1.0", "fontpkg-anek-telugu==1.3"],
    ),
    "bengali": ([(0x985, 0x9B9)], ["fontpkg-hind-siliguri==1.1", "justmytype-intl-south-asia==0.1.0"]),
    "lao, khmer, myanmar": (
        [(0xE81, 0xEAE), (0x1780, 0x17A2), (0x1000, 0x102A)],
        ["justmytype-intl-sea==0.1.0"],
    ),
    "ethiopic": ([(0x1200, 0x1357, 2)], ["justmytype-intl-africa==0.1.0"]),
    "kana, kanji": ([(0x3041, 0x3093), (0x30A1, 0x30F6), (0x4E00, 0x9FA5, 90)], ["pylopdf-fonts-jp==0.1.1"]),
    "hangul": ([(0xAC00, 0xD7A3, 75)], ["pylopdf-fonts-ko==0.1.1"]),
    "symbols": (
        [(0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x25FF)],
        ["fontpkg-fira-code==5.2.post1", "fontpkg-jetbrains-mono==2.211"],
    ),
}
EASY = Style(
    rotate=5,
    shear=0.1,
    scale=(0.85, 1.05),
    stretch=0.1,
    shift=0.04,
    warp=0.04,
    thickness=(-0.2, 0.4),
    blur=(0, 0.4),
    contrast=(0.8, 1),
    gradient=0.1,
    noise=(0, 0.05),
)
HARD = Style(
    rotate=20,
    shear=0.3,
    scale=(0.65, 1.1),
    stretch=0.25,
    shift=0.1,
    warp=0.1,
    thickness=(-0.6, 0.8),
    blur=(0, 1),
    contrast=(0.4, 1),
    gradient=0.4,
    noise=(0, 0.15),
    invert=0.3,
)
STEPS, BATCH, PEAK, WARMUP = 10_000, 64, 1e-3, 100
RISE = 0.4  # of the steps, over which distortion goes from EASY to HARD; a start at HARD does not learn
KEEP_EVERY = 500
CONFIG = {
    "image_size": IMAGE,
    "num_channels": 1,
    "num_encoder_blocks": 3,
    "depths": [1, 1, 4],
    "sr_ratios": [4, 2, 1],
    "hidden_sizes": [48, 96, 288],
    "patch_sizes": [3, 3, 3],
    "strides": [2, 2, 2],
    "num_attention_heads": [1, 2, 6],
    "mlp_ratios": [2, 2, 3],
}
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE, "width": IMAGE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def code_points(ranges: Sequence[tuple[int, ...]]) -> str:
    """The characters of inclusive ranges, each with an optional step.

    >>> code_points([(97, 99), (65, 70, 2)])
    'abcACE'
    """
    return "".join(chr(c) for first, last, *step in ranges for c in range(first, last + 1, *step))


def pretrain(
    glyphs: Sequence[Tensor],
    out: Path,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    config: Mapping[str, Any] = CONFIG,
    seed: int = 0,
    run: Run | None = None,
) -> dict[str, float]:
    """Learn to name the characters, and write the backbone without its head to `out`.

    Draws are keyed by (seed, step), and a checkpoint beside `out` is written every 500 steps, so that an interrupted
    run goes on where it was.

    Args:
        glyphs: the faces of each class, uint8, [faces, side, side].
        out: folder of the base.
        steps: batches seen.
        batch: images in each.
        config: of `transformers.PvtV2Config`.
        seed: of the start and the draws.
        run: progress.

    Returns:
        accuracy over the last tenth of the steps.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.PvtV2ForImageClassification(transformers.PvtV2Config(**config, num_labels=len(glyphs)))
        _initialise(model)
    optimiser = _optimiser(model)
    state = out.with_name(out.name + ".training.pt")
    first, right = 0, torch.zeros(steps)
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        first, right = kept["step"], kept["right"]
    drawn = _drawing(glyphs, batch, seed)
    model.train()
    with (run or Run()).progress.track("pre-training the base", steps) as bar:
        bar.advance(first)
        for step in range(first, steps):
            images, labels = drawn(step, between(EASY, HARD, min(1.0, step / (RISE * steps))))
            for group in optimiser.param_groups:
                group["lr"] = PEAK * _factor(step, steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=(images[:, None] - 0.5) / 0.5).logits.float()
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
            if not torch.isfinite(loss):
                raise FitError(f"pre-training: the loss is {loss.item()} at step {step}.")
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            right[step] = (logits.argmax(1) == labels).float().mean()
            bar.advance(
                1, loss=round(loss.item(), 3), accuracy=round(right[max(0, step - 99) : step + 1].mean().item(), 3)
            )
            if (step + 1) % KEEP_EVERY == 0:
                kept = {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                    "right": right,
                }
                torch.save(kept, state.with_suffix(".partial"))
                state.with_suffix(".partial").replace(state)
    record = {"classes": len(glyphs), "accuracy": right[-max(1, steps // 10) :].mean().item()}
    _save(model, out, record)
    state.unlink(missing_ok=True)
    return record


def _drawing(glyphs: Sequence[Tensor], batch: int, seed: int) -> Callable[[int, Style], tuple[Tensor, Tensor]]:
    """From the number of a step and a style to distorted images and their classes, which follow from these alone."""
    counts = torch.tensor([len(found) for found in glyphs])
    starts = counts.cumsum(0) - counts
    pages = torch.cat(list(glyphs))

    def drawn(step: int, style: Style) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        labels = torch.randint(len(glyphs), (batch,), generator=generator)
        face = (torch.rand(batch, generator=generator) * counts[labels]).long()
        return distort(pages[starts[labels] + face].float() / 255, style, generator), labels

    return drawn


def _optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, whose weight decay leaves biases and norms alone."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK)


def _initialise(model: torch.nn.Module) -> None:
    """Variance that keeps its size through every layer; the class's own start, 0.02, learns more slowly."""
    for weight in model.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
        elif weight.dim() == 2:
            torch.nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)


def _factor(step: int, steps: int) -> float:
    warmup = min(WARMUP, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _save(model: Any, out: Path, record: Mapping[str, float]) -> None:
    from safetensors.torch import save_file

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = model.config.to_diff_dict()
    for key in ("id2label", "label2id", "transformers_version"):
        config.pop(key, None)
    config |= {"architectures": ["PvtV2ForImageClassification"], "dtype": "float32"}
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (partial / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=1) + "\n")
    (partial / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    backbone = {name: w.contiguous() for name, w in model.state_dict().items() if not name.startswith("classifier.")}
    if not backbone:
        raise DataError("the base has no weights.")
    save_file(backbone, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(out)
