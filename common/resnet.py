"""The ResNet for small pictures of He et al. (2016), Sec. 4.2: three stages, no pooling before the last one."""

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; shortcut option A: every second pixel, new channels are zero, half on either side."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.stride, self.extra = (2 if n_in != n_out else 1), (n_out - n_in) // 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(h + x)


class ResNet(nn.Module):
    """[B, channels, H, W] -> logits [B, C]. blocks: per stage, 3 make ResNet-20; width: of the first stage (the others
    have twice and four times as many channels), 16 in He et al."""

    def __init__(self, n_classes: int, channels: int = 3, width: int = 64, blocks: int = 3):
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        for s in (1, 2, 3):
            stage = [BasicBlock(sizes[s - 1] if i == 0 else sizes[s], sizes[s]) for i in range(blocks)]
            setattr(self, f"layer{s}", nn.Sequential(*stage))
        self.fc = nn.Linear(sizes[3], n_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x)).float()
