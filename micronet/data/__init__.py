"""Image sets, their splits, and batches made of them."""

from micronet.data.augment import Augment as Augment
from micronet.data.augment import wrn_augment as wrn_augment
from micronet.data.loader import BatchLoader as BatchLoader
from micronet.data.loader import loaders as loaders
from micronet.data.loader import plain_loader as plain_loader
from micronet.data.named import by_name as by_name
from micronet.data.named import check_name as check_name
from micronet.data.named import usual_augment as usual_augment
from micronet.data.sources import cifar10 as cifar10
from micronet.data.sources import cifar100 as cifar100
from micronet.data.sources import digits as digits
from micronet.data.sources import fetch as fetch
from micronet.data.sources import image_folder as image_folder
from micronet.data.splits import Data as Data
from micronet.data.splits import ImageSet as ImageSet

__all__ = [
    "Augment",
    "BatchLoader",
    "Data",
    "ImageSet",
    "by_name",
    "check_name",
    "cifar10",
    "cifar100",
    "digits",
    "fetch",
    "image_folder",
    "loaders",
    "plain_loader",
    "usual_augment",
    "wrn_augment",
]
