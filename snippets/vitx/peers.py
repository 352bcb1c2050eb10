"""The same methods in other libraries, run as their documentation says, so that costs can stand side by side.

None of them is needed by vitx; ``installed`` names those that can be imported. Each function has the arguments of
``explain`` and returns what the library returns.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn


def _reshape(tokens: Tensor) -> Tensor:
    """Patch tokens (B, 1 + 196, D) as feature maps (B, D, 14, 14)."""
    return tokens[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)


def _grad_cam(name: str) -> Callable:
    def run(model: nn.Module, images: Tensor, target: Tensor) -> Any:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        layer = model.get_submodule("blocks")[-1].norm1  # type: ignore[index]
        with getattr(pytorch_grad_cam, name)(model, [layer], reshape_transform=_reshape) as cam:
            return cam(input_tensor=images, targets=[ClassifierOutputTarget(int(label)) for label in target])

    return run


def _captum(name: str, **options: Any) -> Callable:
    def run(model: nn.Module, images: Tensor, target: Tensor) -> Any:
        import torch
        from captum import attr

        settings = dict(options)
        if settings.pop("patches", False):
            cells = torch.arange(196).view(1, 1, 14, 14)
            settings["feature_mask"] = cells.repeat_interleave(16, 2).repeat_interleave(16, 3)
        if name == "GradientShap":
            settings["baselines"] = torch.zeros_like(images)
        x = images.clone().requires_grad_(name in ("Saliency", "InputXGradient", "IntegratedGradients"))
        return getattr(attr, name)(model).attribute(x, target=target, **settings)

    return run


PEERS: dict[str, dict[str, Callable]] = {
    "saliency-input-gradient": {"captum": _captum("Saliency")},
    "input-x-gradient": {"captum": _captum("InputXGradient")},
    "integrated-gradients": {"captum": _captum("IntegratedGradients", n_steps=50, internal_batch_size=32)},
    "gradientshap": {"captum": _captum("GradientShap", n_samples=5)},
    "occlusion": {"captum": _captum("Occlusion", sliding_window_shapes=(3, 16, 16), strides=(3, 16, 16))},
    "kernelshap": {"captum": _captum("KernelShap", n_samples=200, patches=True)},
    "lime": {"captum": _captum("Lime", n_samples=200, patches=True)},
    "grad-cam": {"grad-cam": _grad_cam("GradCAM")},
    "grad-cam-plus-plus": {"grad-cam": _grad_cam("GradCAMPlusPlus")},
    "layer-cam": {"grad-cam": _grad_cam("LayerCAM")},
    "eigen-cam": {"grad-cam": _grad_cam("EigenCAM")},
    "score-cam": {"grad-cam": _grad_cam("ScoreCAM")},
}
MODULES = {"captum": "captum", "grad-cam": "pytorch_grad_cam"}


def installed(id: str) -> list[str]:
    """Names of the libraries that have the method and can be imported here."""
    return [name for name in PEERS.get(id, {}) if find_spec(MODULES[name]) is not None]
