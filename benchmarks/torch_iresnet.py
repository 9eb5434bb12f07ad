"""IResNet in PyTorch, the peer of `marginface.models.iresnet`; written from the paper."""

import torch
from torch import nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class Block(nn.Module):
    """BN, conv, BN, PReLU, conv (strided), BN, plus the input or its 1×1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.prelu(self.norm2(self.conv1(self.norm1(x))))
        y = self.norm3(self.conv2(y))
        return y + (self.shortcut_norm(self.shortcut(x)) if self.projects else x)


class IResNet(nn.Module):
    """Images [b, 3, h, w] → embeddings [b, embedding_dim]; module names as in marginface."""

    def __init__(self, depth: int, size: int = 112, embedding_dim: int = 512):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        inputs = 64
        self.blocks = []
        for stage, blocks in enumerate(BLOCKS[depth]):
            outputs = 64 * 2**stage
            for i in range(1, blocks + 1):
                name = f"stage{stage + 1}_block{i}"
                self.add_module(name, Block(inputs, outputs, 2 if i == 1 else 1))
                self.blocks.append(name)
                inputs = outputs
        self.last_norm = nn.BatchNorm2d(512)
        self.embedding = nn.Linear(512 * (size // 16) ** 2, embedding_dim)
        self.embedding_norm = nn.BatchNorm1d(embedding_dim)
        self.embedding_norm.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.norm(self.conv(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.embedding_norm(self.embedding(self.last_norm(x).flatten(1)))
