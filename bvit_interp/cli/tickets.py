"""The word `tickets`: a sparse subnetwork for every class, cluster or environment, in one
tensor."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from bvit_interp.cli.analyse import draw
from bvit_interp.cli.options import gathered, parse, processes
from bvit_interp.errors import UserError

_LISTS = ("--set", "--by", "--classes", "--sparsity", "--methods")
_SHOWN = (
    "method",
    "sparsity",
    "ratio",
    "similarity",
    "null_similarity",
    "recall",
    "precision",
    "balanced_accuracy",
    "swapped",
    "accuracy",
    "chance",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find a sparse subnetwork for every class, cluster or environment, and train them in one
    tensor."""

    recipe: str
    """tickets-digits-s (minutes), another recipe or a YAML file: model, data and optimiser. Mixup
    must be off."""
    model: str | None = None
    """timm:NAME in place of the recipe's model, with --set model.key=value; linear layers and
    convolutions are masked, norms, biases and the classifier are not."""
    data: str | None = None
    """Data set, NAME:PATH, in place of the recipe's."""
    by: tuple[str, ...] = ("class",)
    """class (binary, one-vs-rest); class-step (a mask a class and step of a bViT); cluster (of
    --features); column FILE.csv:COLUMN (your environments: a row of split, index and COLUMN for
    every image)."""
    features: str | None = None
    """Checkpoint whose CLS after the last step is clustered."""
    algorithm: str = "kmeans"
    """Of the clusters: kmeans or hdbscan."""
    clusters: int = 4
    """How many clusters; of hdbscan, roughly the most."""
    classes: tuple[str, ...] = ()
    """Names of the classes that take part; by default all."""
    sparsity: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the masked weights to prune, each retrained and scored; 0 trains the dense
    networks."""
    rate: float = 0.5
    """Largest share of the remaining weights that a round prunes."""
    iterations: int = 60
    """Steps of a subset's training before a pruning (T of Algorithm 1)."""
    rewind: int = 0
    """Steps of ordinary training on all classes before the first weights are taken; the paper takes
    them untrained."""
    retrain_epochs: int = 3
    """Passes of the retraining over the largest subset (Algorithm 2; paper: 10)."""
    methods: tuple[str, ...] = ("rtl", "imp", "multi", "random")
    """rtl, and beside it imp (one mask, one model), multi (a model a subset), random (rtl with
    random masks)."""
    limit: int | None = None
    """Score on this many test images; by default all."""
    tolerance: float = 0.05
    """Rise of the masks' mean overlap that is called a collapse."""
    seed: int | None = None
    """Of weights, draws and clusters; by default the recipe's."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change: key=value ..., model.key=value for the model's."""
    out: Path | None = None
    """Folder of tickets.csv, its figure, masks and weights; by default runs/tickets-RECIPE. It goes
    on there."""
    overwrite: bool = False
    """Start again where a search in the folder would go on."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""


def tickets(given: list[str]) -> None:
    """`bvit-interp tickets`."""
    for flag in _LISTS:
        given = gathered(given, flag)
    options = parse(Options, "tickets", given)
    by, *columns = options.by or ("",)
    if len(columns) > 1 or (columns and by != "column"):
        raise UserError(f"--by takes a word, or column FILE.csv:COLUMN, got {' '.join(options.by)}")
    from bvit_interp.training.loop import recipe as recipes
    from bvit_interp.training.pruning.ticket_plan import Tickets

    own = {
        f.name: getattr(options, f.name) for f in fields(Tickets) if f.name not in ("by", "column")
    }
    plan = Tickets(by=by, column=columns[0] if columns else None, **own)
    recipe = recipes.read(options.recipe, options.set, options.data)
    if options.model is not None:
        recipe = replace(recipe, model=_model(options.model, options.set))
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    out = (
        options.out
        or Path("runs") / f"tickets-{Path(options.recipe).stem.removeprefix('tickets-')}"
    )
    with processes(options.device, options.threads) as device:
        from bvit_interp.training.pruning import by_subset as search
        from bvit_interp.training.pruning import lottery
        from bvit_interp.training.pruning import ticket_plot as ticket_figure

        frame = search.run(recipe, plan, out, device, overwrite=options.overwrite)
        shown = frame[
            (frame["subset"] == "all")
            & (frame["layer"] == "all")
            & frame["balanced_accuracy"].notna()
        ]
        print(shown[[*_SHOWN]].to_string(index=False, float_format="{:.3f}".format))
        print(f"\nwrote {out / lottery.TABLE}")
        draw(ticket_figure, frame, out / "tickets.png")


def _model(spec: str, settings: tuple[str, ...]) -> dict[str, object]:
    """A timm model with the arguments that --set gives it, and none of the recipe's."""
    import yaml

    name = spec.removeprefix("timm:")
    if name == spec:
        raise UserError(f"--model takes timm:NAME, got {spec!r}")
    given = (
        setting.removeprefix("model.").partition("=")
        for setting in settings
        if setting.startswith("model.")
    )
    return {"name": name} | {key: yaml.safe_load(value) for key, _, value in given}
