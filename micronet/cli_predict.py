"""`micronet predict`: parse, call, print. An ONNX file is answered for without importing torch."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from micronet.cli_options import Factory, find_users_factory
from micronet.errors import MicronetError, printable
from micronet.file_kind import require_model


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model.pth, a packed file, or an ONNX file of ours.", show_default=False
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any size and mode.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a list with an entry for each image.")] = False,
    factory: Factory = None,
) -> None:
    """Say what is on images: class names with probabilities (softmax), highest first.

    An image is scaled and cropped as training does it with a folder of images. One that can't be read is named, the
    others are answered all the same, and the exit status is 1.

    Example: `micronet predict runs/resnet20_cifar10/model.pth cat.png ship.jpg`
    """
    require_model(model)
    from micronet.predict import open_predictor

    predictor = open_predictor(model, factory=find_users_factory(factory))
    if not predictor.classes:
        print(f"micronet: {model}: names no classes: they are numbered from 0", file=sys.stderr)
    told, failed = [], False
    for path in images:
        try:
            answers = predictor(path, top)
        except MicronetError as error:
            failed = True
            told.append({"image": str(path), "error": str(error)})
            print(f"micronet: {printable(str(error))}", file=sys.stderr)
            continue
        told.append({"image": str(path), "top": [asdict(answer) for answer in answers]})
        if not json:
            print(printable(str(path)))
            for answer in answers:
                print(f"  {100 * answer.probability:6.2f} %  {printable(answer.name)}")
    if json:
        from json import dumps

        print(dumps(told, indent=1))
    if failed:
        raise typer.Exit(1)
