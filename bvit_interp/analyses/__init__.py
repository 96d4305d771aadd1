"""What is asked of a model: one file a question, one word in five places.

Each module has a docstring (the question, figure, formula, source, cost, expectation), `Config`,
`COLUMNS`, `measure(models, data, config, folder) -> DataFrame` and `plot(frame) -> Figure`, and
nothing else public. Modules import torch, pandas and matplotlib inside their functions: help needs
none of them, and a CSV can be drawn without torch.
"""

OF_THE_PAPER = (
    "features",
    "pointing_game",
    "pathways",
    "energy_rank",
    "rank_sweep",
    "step_accuracy",
    "trajectories",
    "dynamics",
    "evaluate",
    "early_exit",
    "attention",
    "cost",
)
"""The questions of bViT's figures, then of its tables."""
THROUGH_TIME = (
    "selectivity",
    "patching",
    "ablation",
    "lens",
    "stability",
    "step_attribution",
    "schedule",
    "circuits",
)
"""Questions that one block at every step makes possible; ours."""
ANALYSES = OF_THE_PAPER + THROUGH_TIME
