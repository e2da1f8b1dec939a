"""Networks for small pictures: factories whose arguments are plain values, so that a file can name and replay them."""

from micronet.models.densenet import densenet121 as densenet121
from micronet.models.googlenet import googlenet as googlenet
from micronet.models.preact_resnet import preact_resnet18 as preact_resnet18
from micronet.models.resnet import resnet18 as resnet18
from micronet.models.resnet import resnet20 as resnet20
from micronet.models.resnet import resnet32 as resnet32
from micronet.models.resnet import resnet34 as resnet34
from micronet.models.resnet import resnet44 as resnet44
from micronet.models.resnet import resnet56 as resnet56
from micronet.models.resnet import resnet110 as resnet110
from micronet.models.separable import separable_net as separable_net
from micronet.models.wide_resnet import wide_resnet as wide_resnet

__all__ = [
    "densenet121",
    "googlenet",
    "preact_resnet18",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet56",
    "resnet110",
    "separable_net",
    "wide_resnet",
]
