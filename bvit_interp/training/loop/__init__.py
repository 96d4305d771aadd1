"""Training by a recipe: data, schedule, optimiser, checkpoints, distillation and studies."""
