"""LeNet-5 as taught today, narrow or wide."""

from torch import Tensor, nn

from lenet_deploy.models.config import KERNEL, LeNet5Config

_POOLINGS: dict[str, type[nn.AvgPool2d] | type[nn.MaxPool2d]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class LeNet5(nn.Module):
    """conv, act, pool, conv, act, pool, reshape, three linear layers.

    Input float32 (N, in_channels, image_size, image_size), output float32 (N, classes) logits.
    """

    def __init__(self, config: LeNet5Config) -> None:
        super().__init__()
        first, second = config.channels
        pooled = config.layers()[3].output
        self.flat_features = pooled[0] * pooled[1] * pooled[2]  # 5*5*16 in the lecture's network
        self.conv1 = nn.Conv2d(config.in_channels, first, KERNEL, padding=config.padding)
        self.conv2 = nn.Conv2d(first, second, KERNEL)
        self.fc1 = nn.Linear(self.flat_features, config.hidden[0])
        self.fc2 = nn.Linear(config.hidden[0], config.hidden[1])
        self.fc3 = nn.Linear(config.hidden[1], config.classes)
        self.pool = _POOLINGS[config.pooling](2)
        self.activation = _ACTIVATIONS[config.activation]()

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(self.activation(self.conv1(image)))
        x = self.pool(self.activation(self.conv2(x)))
        x = x.reshape(-1, self.flat_features)
        x = self.activation(self.fc1(x))
        x = self.activation(self.fc2(x))
        scores: Tensor = self.fc3(x)
        return scores
