"""`micronet score`: parse, call, print."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micronet.cli_options import DataName, DataPlace, Device, Factory, find_users_factory, make_console, use_data
from micronet.file_kind import require_model

if TYPE_CHECKING:
    from micronet.counting import Assume
    from micronet.model_source import ModelSource
    from micronet.rules import Rules
    from micronet.score import Accuracy, Score

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model.pth, a packed file, an ONNX file, timm:NAME, torchvision:NAME or micronet:NAME; a state dict "
        "with --arch.",
        show_default=False,
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(metavar="CxHxW", help="Size of one image, 3x32x32; a comma between several inputs."),
]
Arch = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The network of a state dict: micronet:wide_resnet,depth=22,width=6 or timm:..."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Read a pickled module or a fastai export.pkl. Runs whatever code the file holds."),
]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown", help="List operations without a rule as uncounted, don't refuse them.")
]


def parse_size(text: str | None) -> tuple[Any, ...] | None:
    """Read `3x32x32`, or several of them with commas between."""
    if text is None:
        return None
    try:
        sizes = tuple(tuple(int(n) for n in part.lower().split("x")) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--input-size must be CxHxW, such as 3x32x32, got {text!r}") from None
    if not all(n > 0 for size in sizes for n in size):
        raise typer.BadParameter(f"--input-size must be positive, got {text!r}")
    return sizes[0] if len(sizes) == 1 else sizes


def parse_assume(text: str | None) -> "Assume":
    """Read `bits=8,acc=16,sparsity=0.5`."""
    from micronet.counting import Assume

    kinds = {"bits": int, "acc": int, "sparsity": float}
    given = {}
    for pair in text.split(",") if text else ():
        name, _, value = pair.partition("=")
        if name.strip() in given:
            raise typer.BadParameter(f"--assume: {name.strip()} is given twice")
        try:
            given[name.strip()] = kinds[name.strip()](value)
        except (KeyError, ValueError):
            raise typer.BadParameter(f"--assume takes bits=8,acc=16,sparsity=0.5, got {pair!r}") from None
    try:
        return Assume(**given)
    except ValueError as error:
        raise typer.BadParameter(f"--assume: {error}") from error


def score(
    model: Model,
    rules: Annotated[
        str,
        typer.Option(help="official, official-imagenet, seed, imt, imt-2.8e8, imt-profile; all for a table of them."),
    ] = "official",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a stable form for programs.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the ledger's lines as CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a write-up, ready to submit.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say in words, layer by layer, why each number is.")
    ] = False,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="Put another model beside it.")] = None,
    cross_check: Annotated[
        bool,
        typer.Option("--cross-check", help="Show what other counters say of a torch network, and why they differ."),
    ] = False,
    assume: Annotated[
        str | None, typer.Option(metavar="bits=8,acc=16,sparsity=0.5", help="What it would cost so; marked as assumed.")
    ] = None,
    data: DataName = None,
    data_dir: DataPlace = None,
    input_size: InputSize = None,
    arch: Arch = None,
    factory: Factory = None,
    trust: Trust = False,
    allow_unknown: AllowUnknown = False,
    max_pool: Annotated[bool, typer.Option("--max-pool", help="Count max pooling's comparisons.")] = False,
    free_bn: Annotated[bool, typer.Option("--free-bn", help="A BatchNorm that can't be folded costs nothing.")] = False,
    no_freebie: Annotated[bool, typer.Option("--no-freebie", help="32 bits where nothing is quantised.")] = False,
    acc: Annotated[
        int | None, typer.Option(min=1, max=32, help="Bits of integer accumulators, if you know them.")
    ] = None,
    adder_tree: Annotated[bool, typer.Option("--adder-tree", help="Integer sums by a tree of growing widths.")] = False,
    ps: Annotated[
        float | None, typer.Option(min=0, max=1, help="imt: share of weights removed with structure.")
    ] = None,
    pu: Annotated[float | None, typer.Option(min=0, max=1, help="imt: share of zeros; else read.")] = None,
    qw: Annotated[int | None, typer.Option(min=1, max=32, help="imt: bits of weights; else read.")] = None,
    qa: Annotated[int | None, typer.Option(min=1, max=32, help="imt: bits of activations; else read.")] = None,
    device: Device = None,
) -> None:
    """Count what a model stores and computes for one image, and score it.

    The rules are the MicroNet Challenge's final ones: words of the deployed form, operations by their widest input,
    16 bits for free where nothing is quantised. Others are the fastai entry's ("seed") and a course's ("imt").

    Example: `micronet score runs/wrn_cifar100/model.pth --data cifar100`
    """
    forms = {"--json": json, "--csv": csv, "--markdown": markdown, "--explain": explain}
    _refuse_together({"--against": against is not None} | {k: v for k, v in forms.items() if k != "--json"})
    _refuse_together({"--cross-check": cross_check} | forms)
    _refuse_together({"--acc": acc is not None, "--adder-tree": adder_tree})
    if device is not None and data is None:
        raise typer.BadParameter("--device is where --data is measured: give both")
    options = {"max_pool": max_pool, "free_batch_norm": free_bn, "int_acc_bits": acc, "adder_tree": adder_tree}
    options |= {"ps": ps, "pu": pu, "qw": qw, "qa": qa, "freebie": no_freebie}
    chosen, assumed = _rules(rules, options), parse_assume(assume)
    if trust:
        print(f"micronet: --trust: reading {model} runs whatever code it holds", file=sys.stderr)
    build, size = find_users_factory(factory), parse_size(input_size)
    for name in (model, against):
        if name is not None and not (arch or trust):  # with these, a file is of others, and of any kind
            require_model(name)
    from micronet.model_source import open_model

    def open_it(name: str) -> "ModelSource":
        return open_model(name, input_size=size, factory=build, arch=arch, trust=trust)

    source = open_it(model)
    accuracy = _measure(source, data, data_dir, device)
    scores = _scores(source, chosen, assumed, accuracy, allow_unknown)
    table = None
    if cross_check:
        from micronet.cross_check import cross_check_table

        table = cross_check_table(source, scores[0].ledger)
    if against is not None:
        others = _scores(open_it(against), chosen, assumed, None, allow_unknown)
        _print_against(scores, others, json)
    else:
        _print(scores, json=json, csv=csv, markdown=markdown, explain=explain)
    if table is not None:
        make_console().print(table)


def _refuse_together(given: dict[str, bool]) -> None:
    names = [name for name, there in given.items() if there]
    if len(names) > 1:
        raise typer.BadParameter(f"choose one of {' and '.join(names)}")


# What the options of `Rules` are called on the command line, where that is shorter.
_FLAGS = {
    "freebie": "no-freebie",
    "max_pool": "max-pool",
    "free_batch_norm": "free-bn",
    "int_acc_bits": "acc",
    "adder_tree": "adder-tree",
}


def _rules(name: str, options: dict[str, Any]) -> "list[Rules]":
    from micronet.rules import RULES

    if name != "all" and name not in RULES:
        raise typer.BadParameter(f"--rules must be one of {', '.join((*RULES, 'all'))}, got {name!r}")
    chosen = list(RULES.values()) if name == "all" else [RULES[name]]
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    if given.pop("freebie", False):
        given["freebie"] = False
    for key in given:
        if not any(key in rules.options() for rules in chosen):
            raise typer.BadParameter(f"the rules {name} have no option --{_FLAGS.get(key, key)}")
    return [replace(rules, **{k: v for k, v in given.items() if k in rules.options()}) for rules in chosen]


def _scores(
    source: "ModelSource", rules: "list[Rules]", assume: "Assume", accuracy: "Accuracy | None", allow_unknown: bool
) -> "list[Score]":
    from micronet.score import tally

    ledger = source.ledger(allow_unknown=allow_unknown)
    # Rules without widths can't assume any: left out where all were asked for, refused where they alone were.
    known = [one for one in rules if one.options() or not assume or len(rules) == 1]
    return [tally(source.name, ledger, one, assume, accuracy) for one in known]


def _measure(source: "ModelSource", data: str | None, data_dir: Path | None, device: str | None) -> "Accuracy | None":
    if data is None:
        return None
    use_data(data_dir)
    from micronet.measure import measure
    from micronet.score import Accuracy

    result = measure(source, data, "test", device).result
    return Accuracy(data=f"{data} test", correct=result.top1_count, images=result.images)


def _print(scores: "list[Score]", *, json: bool, csv: bool, markdown: bool, explain: bool) -> None:
    from micronet.score_report import all_rules_table, footer, score_table, summary, to_csv, totals_table
    from micronet.score_writeup import explain as in_words
    from micronet.score_writeup import to_markdown

    if json:
        from json import dumps

        told = [score.to_json() for score in scores]
        print(dumps(told[0] if len(told) == 1 else told, indent=1))
    elif csv or markdown:
        print("\n".join((to_csv if csv else to_markdown)(score) for score in scores), end="")
    elif explain:
        for score in scores:
            print("\n\n".join([*in_words(score), summary(score)]))
    elif len(scores) > 1:
        make_console().print(all_rules_table(scores))
        make_console().print(footer(scores), highlight=False, markup=False)
    else:
        console = make_console()
        console.print(score_table(scores[0], console.width))
        console.print(totals_table(scores[0]))
        console.print(summary(scores[0]), highlight=False, markup=False)


def _print_against(scores: "list[Score]", others: "list[Score]", json: bool) -> None:
    if json:
        from json import dumps

        print(dumps([[one.to_json(), other.to_json()] for one, other in zip(scores, others, strict=True)], indent=1))
        return
    from micronet.score_report import against_table, footer

    for one, other in zip(scores, others, strict=True):
        make_console().print(against_table(one, other))
        make_console().print(footer([one, other]), highlight=False, markup=False)
