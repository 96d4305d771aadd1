"""The words that make weights: `train` a recipe, `study` a grid of them, `prune` one step by
step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from bvit_interp.cli.analyse import draw
from bvit_interp.cli.options import gathered, parse, processes

if TYPE_CHECKING:
    from bvit_interp.training.loop.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model by a recipe and leave a checkpoint folder."""

    recipe: tuple[str, ...]
    """A shipped recipe (cifar10, imagenette-d128, ...; an unknown name lists them) or a YAML file.
    Several are trained side by side on one device."""
    data: str | None = None
    """Data set, NAME:PATH, in place of the recipe's; it needs a train split and one to score on."""
    seeds: tuple[int, ...] = ()
    """Train each recipe with each of these seeds; by default with the recipe's own."""
    out: Path | None = None
    """Checkpoint folder; by default runs/RECIPE. Of several runs, the folder of RECIPE-seedN
    folders; by default runs. A run that was stopped there goes on."""
    overwrite: bool = False
    """Start again where a run in the folder would go on."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change: key=value ..., model.key=value for the model's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""
    minutes: float | None = None
    """Stop after this many minutes, with a state from which the same command goes on; by default
    train to the end."""
    save_minutes: float = 2.0
    """Minutes between two savings of the state within an epoch."""
    tensorboard: bool = False
    """Log for TensorBoard too, in the folder."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Train a grid of models (width, steps, heads or blocks) and write one table and its figure."""

    name: tyro.conf.Positional[str]
    """width, steps, heads, blocks, width-small (two hours on a CPU core), or a .yaml file of your
    own."""
    recipe: str | None = None
    """Recipe of all runs in place of the study's (cifar10-d128): digits-s needs no data, for
    instance."""
    data: str | None = None
    """Data set, NAME:PATH, in place of the recipe's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every point is trained with each."""
    set: tuple[str, ...] = ()
    """Settings to change in all runs: key=value ..., model.key=value for the model's."""
    out: Path | None = None
    """Folder for the table, the figure and a checkpoint a run; by default runs/study-NAME. It goes
    on there."""
    overwrite: bool = False
    """Start again where a study in the folder would go on."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""
    save_minutes: float = 2.0
    """Minutes between two savings of a run's state within an epoch."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a bViT with a mask for every step, beside one mask for all steps and random ones."""

    recipe: str
    """cifar10-pathways (the paper's model), cifar10-d128-pathways, digits-s-pathways (minutes), or
    a YAML file."""
    rounds: int = 4
    """Prunings P; one more training follows, so that every mask has its accuracy (paper: 30)."""
    epochs: int | None = None
    """Epochs E of each round's training; by default the recipe's (paper: 200)."""
    graft_epochs: int = 1
    """Epochs G of a round's grafts; each costs about five of the training's (paper: 100)."""
    rate: float = 0.2
    """Share of a step's active weights that a pruning takes, between 0 and 1."""
    ranking: str = "global"
    """Smallest weights of a step over its four matrices together (global) or in each (layer)."""
    methods: tuple[str, ...] = ("rtl", "magnitude", "random")
    """rtl (a graft for every step) and the baselines: magnitude (one mask for all steps),
    random."""
    data: str | None = None
    """Data set, NAME:PATH, in place of the recipe's."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change: key=value ..., model.key=value for the model's."""
    out: Path | None = None
    """Folder for rounds.csv and METHOD/round-NN; by default runs/prune-RECIPE. It goes on there."""
    overwrite: bool = False
    """Start again where a pruning in the folder would go on."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""
    save_minutes: float = 2.0
    """Minutes between two savings of the state within an epoch."""


def train(given: list[str]) -> None:
    """`bvit-interp train`."""
    given = gathered(gathered(gathered(given, "--set"), "--recipe"), "--seeds")
    options = parse(Train, "train", given)
    from bvit_interp import results
    from bvit_interp.errors import UserError

    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"minutes must be > 0, got {options.minutes}")
    if not options.save_minutes >= 0:
        raise UserError(f"save-minutes must be >= 0, got {options.save_minutes}")
    plans = _plans(options)
    with processes(options.device, options.threads) as device:
        from bvit_interp.training.loop import supervised
        from bvit_interp.training.loop.trainer import HISTORY

        supervised.train_all(
            plans,
            device,
            overwrite=options.overwrite,
            tensorboard=options.tensorboard,
            save_minutes=options.save_minutes,
            minutes=options.minutes,
        )
        if results.rank_and_world()[0] == 0:
            for plan, out in plans:
                epochs = len(results.read_table(out / HISTORY)) if (out / HISTORY).is_file() else 0
                if epochs == plan.epochs:
                    print(f"wrote {out}")
                else:
                    print(f"stopped {out} before its last epoch; the same command goes on")


def _plans(options: Train) -> list[tuple[Recipe, Path]]:
    """Recipe and folder of every run."""
    from bvit_interp.errors import UserError, choices
    from bvit_interp.training.loop import recipe

    if not options.recipe:
        raise UserError(
            f"--recipe needs at least one; shipped: {choices(recipe.available(), 40)}; or a YAML file"
        )
    if options.seeds and any(setting.partition("=")[0] == "seed" for setting in options.set):
        raise UserError("--seeds and --set seed=... both give the seed: take one of them")
    seeds = [[f"seed={seed}"] for seed in dict.fromkeys(options.seeds)] or [[]]
    plans = [
        (name, recipe.read(name, [*options.set, *seed], options.data))
        for name in dict.fromkeys(options.recipe)
        for seed in seeds
    ]
    if len(plans) == 1:
        ((name, plan),) = plans
        return [(plan, options.out or Path("runs") / Path(name).stem)]
    parent = options.out or Path("runs")
    return [(plan, parent / f"{Path(name).stem}-seed{plan.seed}") for name, plan in plans]


def study(given: list[str]) -> None:
    """`bvit-interp study`."""
    options = parse(Study, "study", gathered(gathered(given, "--set"), "--seeds"))
    from bvit_interp import results
    from bvit_interp.training.loop import study as studies

    plan = studies.read(options.name, options.recipe, options.set, options.data)
    out = options.out or Path("runs") / f"study-{Path(options.name).stem}"
    with processes(options.device, options.threads) as device:
        frame = studies.run(
            plan,
            options.seeds,
            out,
            device,
            overwrite=options.overwrite,
            save_minutes=options.save_minutes,
        )
        if results.rank_and_world()[0] == 0:
            from bvit_interp.training.loop import study_plot as study_figure

            print(frame.to_string(index=False, float_format="{:.3f}".format))
            draw(study_figure, frame, out / f"study_{plan.name}.png")


def prune(given: list[str]) -> None:
    """`bvit-interp prune`."""
    options = parse(Prune, "prune", gathered(gathered(given, "--set"), "--methods"))
    from bvit_interp import results
    from bvit_interp.training.loop import recipe
    from bvit_interp.training.pruning import by_step as pruning

    plan = pruning.Pruning(
        rounds=options.rounds,
        graft_epochs=options.graft_epochs,
        rate=options.rate,
        ranking=options.ranking,
        methods=options.methods,
    )
    epochs = () if options.epochs is None else (f"epochs={options.epochs}",)
    trained = recipe.read(options.recipe, (*options.set, *epochs), options.data)
    out = options.out or Path("runs") / f"prune-{Path(options.recipe).stem}"
    with processes(options.device, options.threads) as device:
        frame = pruning.run(
            trained,
            plan,
            out,
            device,
            overwrite=options.overwrite,
            save_minutes=options.save_minutes,
        )
        if results.rank_and_world()[0] == 0:
            print(frame.to_string(index=False, float_format="{:.3f}".format))
            print(f"\nwrote {out / pruning.TABLE}")
