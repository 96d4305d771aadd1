"""What is asked of a model: one file a question, one word in five places.

Each module has a docstring (the question, figure, formula, source, cost, expectation), `Config`, `COLUMNS`,
`measure(models, data, config, folder) -> DataFrame` and `plot(frame) -> Figure`, and nothing else public.
Modules import torch, pandas and matplotlib inside their functions: help needs none of them, and a CSV can be
drawn without torch.
"""

ANALYSES = (
    "features", "pointing_game", "pathways", "energy_rank", "rank_sweep", "step_accuracy", "trajectories", "dynamics",
    "evaluate", "early_exit", "attention", "cost",
)  # fmt: skip
"""The questions there are, in the order of the paper's figures; then its tables."""
